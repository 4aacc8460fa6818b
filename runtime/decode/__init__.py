"""From logits to answers: labels, texts and events."""
