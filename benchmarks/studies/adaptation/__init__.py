"""Does self-alignment help on bodies that nothing was trained on, and does it harm where all is right?

    python -m benchmarks.studies.adaptation CHECKPOINT --output runs/adaptation

On unseen simulated bodies the aligner and what it has to beat each yield a token, and the policy reaches with it
(``arms``); the token's worth over the number of transitions (``curves``); a robot that changes while it works
(``shifts``); one that is already right (``right``). Writes ``adaptation.json`` and plots, prints tables and which
targets were met. What was measured is kept under ``--output`` per body and arm: a study that was interrupted goes on.
On two cores the defaults take about an hour and a half; ``--parts arms --families all --ranges inside`` four minutes.
"""
