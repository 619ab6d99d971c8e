"""Speed, memory and accuracy, measured; each module is a command."""
