"""Ask an MLflow store for one experiment, in a process that may wait for ever. Nothing is written."""

from __future__ import annotations

from x1_pretrain.doctor.trial import Facts, Voice, answered
from x1_pretrain.records import mlflow_store


def answer(task: Facts, voice: Voice) -> None:
    try:
        found = mlflow_store.connect(task["uri"]).search_experiments(max_results=1)
    except Exception as error:  # whatever a store, a server or MLflow itself raises is the finding
        voice.say("store", trouble=mlflow_store.reason_of(error))
        return
    voice.say("store", experiments=len(found))


if __name__ == "__main__":
    answered(answer)
