"""Pages for people: the latent brush, which a local server answers, and the page of one or several runs."""
