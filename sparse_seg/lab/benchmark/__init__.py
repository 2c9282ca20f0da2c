"""One network run in many ways on one picture: time, multiply-adds and memory."""
