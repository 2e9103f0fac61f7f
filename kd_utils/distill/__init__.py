"""How far is the student from the teacher? Batches, targets and the terms of the loss."""
