"""Code that several attention methods use: argument checks and the softmax ring."""
