"""What a run leaves to go on from: checkpoints, and what a resumed run takes from them."""
