"""What a component costs on this machine, measured, and what follows from that.

`trial` measures one graph in a child process, `footprint` says what is found, `store` remembers it. `tune` chooses
engines and precisions by it, `plan` keeps a memory limit.
"""
