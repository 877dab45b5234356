// Package argo tests statements about Argo Workflows with Argo's own functions.
package argo

import (
	"encoding/json"
	"os"
	"testing"

	wfv1 "github.com/argoproj/argo-workflows/v4/pkg/apis/workflow/v1alpha1"
	"github.com/argoproj/argo-workflows/v4/util/expr/argoexpr"
	"github.com/argoproj/argo-workflows/v4/util/expr/env"
	"github.com/argoproj/argo-workflows/v4/workflow/common"
	"github.com/argoproj/argo-workflows/v4/workflow/util"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apimachinery/pkg/util/strategicpatch"
	"sigs.k8s.io/yaml"
)

// kubeflowDefaults are the workflowDefaults that Kubeflow Pipelines 2.17.0 installs.
const kubeflowDefaults = `
spec:
  ttlStrategy: {secondsAfterCompletion: 3600, secondsAfterSuccess: 3600, secondsAfterFailure: 3600}
  templateDefaults:
    retryStrategy: {limit: '2', retryPolicy: OnError}
`

// patchedDefaults returns the workflowDefaults of the patch in manifests/.
func patchedDefaults(t *testing.T) string {
	t.Helper()
	content, err := os.ReadFile("../../manifests/workflow-controller/retries.yaml")
	check(t, err)
	var patch struct{ Data map[string]string }
	check(t, yaml.UnmarshalStrict(content, &patch))
	return patch.Data["workflowDefaults"]
}

// mergedTemplates returns the templates of a task and of a graph after Argo has merged the defaults.
//
// The task has the strategy that Kubeflow's compiler makes from set_retry. Argo's controller merges the workflow's
// defaults with util.MergeTo. Its merge of the templateDefaults is not exported. The call of StrategicMergePatch below
// is the one inside it.
func mergedTemplates(t *testing.T, defaults string) (task, graph wfv1.Template) {
	t.Helper()
	limit, factor := intstr.FromString("10"), intstr.FromString("1")
	backoff := &wfv1.Backoff{Duration: "30", Factor: &factor, MaxDuration: "3600"}
	workflow := &wfv1.Workflow{Spec: wfv1.WorkflowSpec{Templates: []wfv1.Template{
		{Name: "task", RetryStrategy: &wfv1.RetryStrategy{Limit: &limit, Backoff: backoff}},
		{Name: "graph", DAG: &wfv1.DAGTemplate{}},
	}}}
	patch := &wfv1.Workflow{}
	check(t, yaml.UnmarshalStrict([]byte(defaults), patch))
	check(t, util.MergeTo(patch, workflow))
	templateDefaults, err := json.Marshal(workflow.Spec.TemplateDefaults)
	check(t, err)
	merged := make([]wfv1.Template, len(workflow.Spec.Templates))
	for i := range merged {
		own, err := json.Marshal(workflow.Spec.Templates[i])
		check(t, err)
		result, err := strategicpatch.StrategicMergePatch(templateDefaults, own, wfv1.Template{})
		check(t, err)
		check(t, json.Unmarshal(result, &merged[i]))
	}
	return merged[0], merged[1]
}

func TestKubeflowRetriesOnlyErrors(t *testing.T) {
	task, graph := mergedTemplates(t, kubeflowDefaults)
	checkPolicies(t, wfv1.RetryPolicyOnError, task, graph)
	if task.RetryStrategy.Limit.String() != "10" || task.RetryStrategy.Backoff.Duration != "30" {
		t.Errorf("the task lost its own limit or backoff: %v", task.RetryStrategy)
	}
}

func TestThePatchKeepsTheOtherDefaults(t *testing.T) {
	var theirs, ours wfv1.Workflow
	check(t, yaml.UnmarshalStrict([]byte(kubeflowDefaults), &theirs))
	check(t, yaml.UnmarshalStrict([]byte(patchedDefaults(t)), &ours))
	own := theirs.Spec.TemplateDefaults.RetryStrategy
	own.RetryPolicy = wfv1.RetryPolicyAlways
	own.Expression = ours.Spec.TemplateDefaults.RetryStrategy.Expression
	if theirs.Spec.String() != ours.Spec.String() {
		t.Errorf("%v\n%v", theirs.Spec, ours.Spec)
	}
}

func TestThePatchRetriesWhatHelps(t *testing.T) {
	task, graph := mergedTemplates(t, patchedDefaults(t))
	checkPolicies(t, wfv1.RetryPolicyAlways, task, graph)
	// The values are those that inferFailedReason, getExitCode, podReconciliation and executeDAG of Argo 4.0.5 leave.
	for _, attempt := range []struct {
		name, status, exitCode, message string
		retried                         bool
	}{
		{"killed for its memory", "Failed", "137", "main: OOMKilled (exit code 137)", true},
		{"terminated", "Failed", "143", "main: Error (exit code 143)", true},
		{"the stage failed", "Failed", "1", "main: Error (exit code 1)", false},
		{"the launcher was refused", "Failed", "2", "main: Error (exit code 2)", false},
		{"deleted", "Error", "-1", "pod deleted", true},
		{"evicted", "Failed", "-1", "The node was low on resource: memory.", true},
		{"evicted, with the launcher's code", "Failed", "1", "The node was low on resource: memory.", true},
		{"its disk is full", "Failed", "137", "Pod ephemeral local storage usage exceeds the total limit", true},
		{"time limit", "Failed", "1", "Pod was active on the node longer than the specified deadline", true},
		{"node shutdown", "Failed", "-1", "Pod was terminated in response to imminent node shutdown.", true},
		{"outputs not stored", "Error", "0", "wait: Error (exit code 64)", true},
		{"graph with a failed task", "Failed", "-1", "", false},
		{"graph with a deleted task", "Error", "-1", "", false},
	} {
		t.Run(attempt.name, func(t *testing.T) {
			scope := env.GetFuncMap(map[string]any{
				common.LocalVarRetries:             "0",
				common.LocalVarRetriesLastExitCode: attempt.exitCode,
				common.LocalVarRetriesLastStatus:   attempt.status,
				common.LocalVarRetriesLastDuration: "1",
				common.LocalVarRetriesLastMessage:  attempt.message,
			})
			retried, err := argoexpr.EvalBool(task.RetryStrategy.Expression, scope)
			check(t, err)
			if retried != attempt.retried {
				t.Errorf("retried: %t", retried)
			}
		})
	}
}

func checkPolicies(t *testing.T, expected wfv1.RetryPolicy, templates ...wfv1.Template) {
	t.Helper()
	for _, template := range templates {
		if policy := template.RetryStrategy.RetryPolicyActual(); policy != expected {
			t.Errorf("%s: %s", template.Name, policy)
		}
	}
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
