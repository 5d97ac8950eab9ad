"""Model code that is copied into exported folders; lcdist never imports it."""
