"""Models: loading, the LoRA and the reference policy, the forward pass in parts, attention and its caches."""
