"""Pure policy: the standard library only, no clock, no input or output."""
