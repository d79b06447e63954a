/* y = x (U V + S)ᵀ + b for an S whose entries lie packed row by row; see native.py for who calls what.

   S (m, n) is held as its values in row-major order, `starts` (m + 1: where each row's values begin) and one of
     bits   one bit an entry, ceil(n / 8) bytes a row, lowest bit first;
     gaps   one byte a value: the entries skipped before it; 255 skips 255 and carries no value. `gap_starts` (m + 1)
            says where each row's bytes begin, and the counter begins anew in every row.
   Whatever lies in these arrays has been checked before: nothing is checked here.

   Four ways to the product:
     spread  32 values at a time are spread over their columns in a register and multiplied with x as it lies
             (AVX-512 only). Costs the same for any density: for few rows of x.
     walk    each value times a row of xᵀ, 16 to 64 rows of x at once: for sparse S and any number of rows.
     expand  rows of S written densely into scratch memory, for a dense product;
     block   where S keeps whole rows or columns, its values are a dense matrix, and read as one.
   Values stream from memory once and are read long before the processor's own prefetcher would dare to: asking for
   them a kilobyte ahead is worth a factor of two to three. */

#include "layer.h"
#include "columns.h"
#include "walk.h"
#include "low_rank.h"
#include "spread.h"
#include "few.h"
#include "block.h"
#include "expand.h"
#include "stored.h"
#include "streams.h"
#include "codes.h"
#include "step.h"
