"""Conversations: templates, loss on the assistant's turns, answers given all that was said before."""
