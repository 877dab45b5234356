#!/usr/bin/env bash
# Builds Kubernetes' API server, controllers, kubectl and etcd from Go modules, for test_api_server.py and test_indexed_job.py
# in tests/deployment (ten minutes on two cores).
set -euo pipefail
cd "$(dirname "$0")"
to=${GOBIN:-$HOME/go/bin}
mkdir -p "$to"
go build -trimpath -o "$to/" k8s.io/kubernetes/cmd/kube-apiserver k8s.io/kubernetes/cmd/kubectl
go build -trimpath -o "$to/etcd" go.etcd.io/etcd/server/v3
go build -trimpath -o "$to/" k8s.io/kubernetes/cmd/kube-controller-manager
