"""Export: from a torch pipeline to a verified bundle that runs without torch.

torch, diffusers, transformers and onnx are imported inside the modules that use them; importing this package or its
`cli` loads none of them. Start at `export.py`, which runs the stages in order.
"""
