"""What the stages share, and where it is:

bytes by URI     storage, stores/; ahead: by threads, before they are asked for; row_groups: a Parquet file in parts
samples          shards: found and read; splits: with labels; decode, clips: to pixels; preprocess, views: cut
networks         architectures: by name; networks: built; weights: from elsewhere; checkpoints, models: kept; export
what they say    predict: logits of a split; predictions: kept; measures: accuracies and how sure they are
scores at rest   scores: ranked, of a unit; places: where its samples lie; removal: what may not be selected
a stage          stage: config and ways in; receipts; summaries: in words; runfile, hardware: what a run is told
many pods        claims: who does what; fanout: how many; tasks: what each says of itself; metrics: for Prometheus
a process        progress: its log; errors, wording: its last line; stopping, lifeline: its end; cores, memory; beside:
                 another one
"""
