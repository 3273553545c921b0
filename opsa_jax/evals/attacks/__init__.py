"""Robustness under attack: what a trained model does when somebody tries to talk, push or optimise it out of refusing.

A defensive measurement: every attack here is published and reimplemented to be scored, and the texts are generic.
"""
