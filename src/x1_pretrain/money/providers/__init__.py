"""Those who rent machines, behind one small protocol: Lambda, RunPod, this machine, and a fake of ours."""
