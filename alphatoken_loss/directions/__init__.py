"""The directions that tokens are valued along: target, Fisher drift, and the optimizer's scale."""
