"""Records: what a run left behind, and what can be read from it.

A run is a folder of plain files, written (`metrics`) by the training loop as it goes. This room reads that
folder (`run_folder`), draws it (`plots`), copies its metrics to MLflow (`mlflow_sink`, `mlflow_store`), makes
the folder to show others (`export_folder`) and tells which data each step read (`data_order`) and what its
mirror has (`mirror_state`, `behind`). One process writes to it at a time (`lock`, `processes`); checkpoints
appear whole in it (`checkpoint_files`), and old ones go (`retention`).
Nothing here needs torch: a run can be read on any machine.
"""
