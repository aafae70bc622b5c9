"""What a person sees in a terminal: console, chat, lists, inspection."""
