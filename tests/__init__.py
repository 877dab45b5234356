"""The tests, on real files, servers and processes; our own code is never mocked. What they start from:

pictures, videos     small samples that a tiny network can learn, and a run file for them
stages               the stages one after the other, as functions, each done when it is first asked for
trainings            a training as a process, and what it left
selections           a plan and a selection without the stages before them
boards               tasks of a run, as pods tell of them
servers, flaky       object stores, each a process; proxies before them that are late, hang, or break off
kfp_server, cluster  stand-ins, over HTTP, for Kubeflow Pipelines and for what runs a TrainJob
api_server           Kubernetes' own API server, where apiserver/build.sh could build it
kustomize            what kustomize makes of manifests/, for machines that have none
logged_training      a training that writes down what it is shown
processes            whether one has ended, and which work beside it
"""
