"""smalti: image tokenizers, stored latent sets and discrete priors."""
