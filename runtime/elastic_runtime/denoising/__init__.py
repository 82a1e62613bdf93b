"""From a session to a guided prediction, and from the last state to a picture: guidance, labels, tokens, prompts."""
