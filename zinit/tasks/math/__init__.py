"""Math word problems: reasoning is trained on, the final answer is scored."""
