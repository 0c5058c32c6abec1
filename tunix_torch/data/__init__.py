"""Questions on their way to the model: rows are read from files and hubs, understood, tokenised and padded."""
