"""One file a case; every module in this folder is imported by the runner and registers itself with `@case`."""
