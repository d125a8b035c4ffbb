"""A provider of our own: a real server that speaks RunPod's and Lambda's APIs, meters, and lies as told."""
