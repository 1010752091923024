"""Terms that let a teacher model guide the student."""
