"""What chooses how a picture is drawn: policies, and the estimates, measurements and costs that they go by."""
