"""Commands: one file for each word after `lcdist`, and the programs that `launch/` starts."""
