"""One adapter on one model: attach it, switch it, save it."""
