"""How the embedded model is trained: every stage from pictures to the folder that `pocketdiffusion export` reads."""
