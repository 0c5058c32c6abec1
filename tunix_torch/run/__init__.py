"""A whole job: its folder, callbacks, curves and export."""
