"""The sparse code's arithmetic: which latents can fire, and what decoding them and their gradients cost."""
