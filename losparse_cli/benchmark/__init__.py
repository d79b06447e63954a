"""How fast models run, and how much memory they take, dense beside compressed in the same run."""
