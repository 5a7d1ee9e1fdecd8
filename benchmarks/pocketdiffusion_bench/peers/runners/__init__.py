"""Scripts that the peers' own Pythons run; nothing of ours imports them at run time, nor do they import ours."""
