"""Orders as data: which steps a rank takes, in which windows.  Nothing here moves a byte."""
