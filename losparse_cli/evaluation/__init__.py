"""How a model does on a text, alone or beside another: windows, scores, figures with standard errors."""
