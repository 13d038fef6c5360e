{{- /*
What fits together is decided here, before anything is applied: each wrong value gets one sentence. What one value may be,
values.schema.json has said by then.
*/ -}}
{{- define "baton.checks" -}}
{{- include "baton.checkNames" . }}
{{- include "baton.checkSet" (dict "root" . "name" "config" "config" .Values.config) }}
{{- include "baton.checkRelease" . }}
{{- range $at, $component := dict "scheduler" .Values.scheduler "frontProxy" .Values.frontProxy "operator" .Values.operator "model.s3" (.Values.model.s3 | default dict) }}
{{- include "baton.checkResources" (dict "at" $at "resources" $component.resources) }}
{{- include "baton.checkEnv" (dict "at" $at "env" $component.env) }}
{{- end }}
{{- range $name, $pool := .Values.pools }}
{{- $config := mergeOverwrite (deepCopy $.Values.config) (deepCopy ($pool.config | default dict)) }}
{{- $this := dict "root" $ "name" $name "at" (printf "pools.%s" $name) "pool" $pool "config" $config }}
{{- include "baton.checkSet" (dict "root" $ "name" (printf "pools.%s.config" $name) "config" ($pool.config | default dict)) }}
{{- include "baton.checkOwnSettings" $this }}
{{- include "baton.checkPod" $this }}
{{- include "baton.checkDevices" $this }}
{{- include "baton.checkReplicas" $this }}
{{- end }}
{{- end }}

{{- /* Of the release and its pools, after which objects are named. */ -}}
{{- define "baton.checkNames" -}}
{{- if or (gt (len .Release.Name) 40) (not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" .Release.Name)) }}
{{- fail (printf "the release name %q: at most 40 small letters, digits and dashes, a letter first; objects are named after it" .Release.Name) }}
{{- end }}
{{- range $name, $pool := .Values.pools }}
{{- if not (regexMatch "^[a-z]([-a-z0-9]{0,28}[a-z0-9])?$" $name) }}
{{- fail (printf "pools.%s: a pool's name has at most 30 small letters, digits and dashes, a letter first" $name) }}
{{- end }}
{{- if or (has $name (list "scheduler" "front-proxy" "operator" "model-copy" "ca")) (hasPrefix "dashboard-" $name) }}
{{- fail (printf "pools.%s: the chart names another object so; take another name" $name) }}
{{- end }}
{{- $most := eq ($pool.workload | default "Deployment") "LeaderWorkerSet" | ternary 50 63 }}
{{- if gt (add 1 (len $.Release.Name) (len $name)) $most }}
{{- fail (printf "pools.%s: %s-%s names its objects, and of this kind a name has at most %d characters; take a shorter one" $name $.Release.Name $name $most) }}
{{- end }}
{{- end }}
{{- end }}

{{- /* What the chart sets or cannot mount, in `config` or in a pool's own. Needs a dict: root, name (the value's path), config. */ -}}
{{- define "baton.checkSet" -}}
{{- $this := . }}
{{- $values := .root.Values }}
{{- $set := dict
  "scheduler" (list "host" "port" "advertise_host" "advertise_port" "metrics_port" "scheduler_id" "leader_store" "leader_lock_file")
  "worker" (list "host" "port" "advertise_host" "advertise_port" "metrics_port" "worker_id" "topology" "scheduler_address")
  "front_proxy" (list "host" "port" "grpc_port" "metrics_port" "front_proxy_id" "scheduler_address")
  "tls" (list "cert_file" "key_file" "ca_file" "name") }}
{{- $files := dict
  "scheduler" (list "latency_profile")
  "front_proxy" (list "tls_cert_file" "tls_key_file")
  "auth" (list "secrets_dir")
  "accounts" (list "rules_file" "ledger_file")
  "tls" (list "token_file") }}
{{- range $why, $sections := dict "the chart sets it" $set "it names a file, and the chart mounts none" $files }}
{{- range $section, $keys := $sections }}
{{- range $key := $keys }}
{{- if hasKey (dig $section dict $this.config) $key }}{{ fail (printf "%s.%s.%s: %s; leave it out" $this.name $section $key $why) }}{{ end }}
{{- end }}
{{- end }}
{{- end }}
{{- if hasKey (dig "scheduler" "kubernetes" dict .config) "lease_name" }}
{{- fail (printf "%s.scheduler.kubernetes.lease_name: the chart sets it; leave it out" .name) }}
{{- end }}
{{- range $key, $_ := dig "scheduler" "scaling" dict .config }}
{{- if has $key (list "actuator" "idle_s" "prefill_min" "decode_min") }}
{{- fail (printf "%s.scheduler.scaling.%s: the chart sets it, by autoscale of the pools and scaling.idleSeconds" $this.name $key) }}
{{- end }}
{{- end }}
{{- if and $values.model.claim (dig "engine" "model" "" .config) }}
{{- fail (printf "%s.engine.model: the chart sets it where model.claim is set; leave one of the two out" .name) }}
{{- end }}
{{- $arguments := .root.Files.Get "arguments.json" | fromJson }}
{{- range $key, $_ := dig "engine" "args" dict .config }}
{{- with get $arguments $key }}{{ fail (printf "%s.engine.args.%s: set config.%s instead" $this.name $key .) }}{{ end }}
{{- end }}
{{- end }}

{{- /* What is of no pool alone. */ -}}
{{- define "baton.checkRelease" -}}
{{- $values := .Values }}
{{- $roles := list }}
{{- $scaled := false }}
{{- range $values.pools }}
{{- $roles = append $roles .role }}
{{- if .autoscale }}{{ $scaled = true }}{{ end }}
{{- end }}
{{- if not (or (has "decode" $roles) (has "colocated" $roles)) }}
{{- fail "pools: one with role decode or colocated is needed; deploy/helm/examples has whole files of values" }}
{{- end }}
{{- if or (ne (dig "auth" "mode" "off" $values.config) "off") (ne (dig "accounts" "mode" "off" $values.config) "off") }}
{{- fail "config.auth and config.accounts: the chart has no volume for secrets and ledger yet; put a gateway with keys before the front proxies" }}
{{- end }}
{{- range $tier := dig "kv" "tiers" list $values.config }}
{{- if and (hasPrefix "file:" $tier) (not $values.kvVolume) }}
{{- fail (printf "config.kv.tiers: %q has no volume; set kvVolume, which is mounted at /kv" $tier) }}
{{- end }}
{{- if and (hasPrefix "file:" $tier) (not (regexMatch "^file:/kv[/:]" $tier)) }}
{{- fail (printf "config.kv.tiers: %q is on no volume; kvVolume is mounted at /kv, so say file:/kv:SIZE" $tier) }}
{{- end }}
{{- end }}
{{- if and $values.gateway.enabled (not $values.gateway.name) }}{{ fail "gateway.name: the Gateway that the route belongs to is needed" }}{{ end }}
{{- if and $values.gateway.inferencePool.enabled (not $values.gateway.enabled) }}
{{- fail "gateway.inferencePool: it is reached by the route, which gateway.enabled makes; set that too" }}
{{- end }}
{{- if and $values.gateway.inferencePool.enabled (not $values.gateway.inferencePool.picker) }}
{{- fail "gateway.inferencePool.picker: the Service of an endpoint picker is needed; without one leave inferencePool off" }}
{{- end }}
{{- if and (eq $values.scaling.actuator "operator") (not $scaled) }}
{{- fail "scaling.actuator: the operator has nothing to scale; give a pool autoscale" }}
{{- end }}
{{- end }}

{{- /* A pool's own settings: which it may have, and which are the same for all. */ -}}
{{- define "baton.checkOwnSettings" -}}
{{- $this := . }}
{{- range $section, $own := .pool.config }}
{{- if not (has $section (list "engine" "worker" "prefill_worker" "decode_worker")) }}
{{- fail (printf "%s.config.%s: a pool's own settings are of engine, worker, prefill_worker and decode_worker" $this.at $section) }}
{{- end }}
{{- range $key, $value := $own }}
{{- $common := dig $section $key "" $this.root.Values.config }}
{{- if and (eq $section "engine") (has $key (list "block_size_tokens" "model" "dtype" "tensor_parallel_size" "kind")) (ne (toString $value) (toString $common)) }}
{{- fail (printf "%s.config.engine.%s: pools exchange KV, so it is the same for all; set config.engine.%s" $this.at $key $key) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- /* What Kubernetes is asked for each pod of a pool. */ -}}
{{- define "baton.checkPod" -}}
{{- $pool := .pool }}
{{- if and $pool.instanceType (hasKey ($pool.nodeSelector | default dict) "node.kubernetes.io/instance-type") }}
{{- fail (printf "%s.nodeSelector: instanceType sets node.kubernetes.io/instance-type; leave one of the two out" .at) }}
{{- end }}
{{- include "baton.checkEnv" (dict "at" .at "env" $pool.env) }}
{{- $size := $pool.groupSize | default 1 | int }}
{{- if and (gt $size 1) (ne ($pool.workload | default "Deployment") "LeaderWorkerSet") }}
{{- fail (printf "%s.groupSize: %d pods for one engine need workload LeaderWorkerSet" .at $size) }}
{{- end }}
{{- if and $pool.exclusiveTopology (ne ($pool.workload | default "Deployment") "LeaderWorkerSet") }}
{{- fail (printf "%s.exclusiveTopology: it is of groups, and needs workload LeaderWorkerSet" .at) }}
{{- end }}
{{- if and (gt $size 1) (not $pool.instanceType) }}
{{- fail (printf "%s.instanceType: a group of %d pods waits for its slowest node, so name one type for all" .at $size) }}
{{- end }}
{{- if and (gt $size 1) (eq $pool.role "colocated") }}{{ fail (printf "%s.groupSize: a colocated pod is on one node" .at) }}{{ end }}
{{- include "baton.checkResources" (dict "at" .at "resources" $pool.resources) }}
{{- $memory := dig "resources" "limits" "memory" "" $pool }}
{{- $shared := $pool.sharedMemory | default "8Gi" }}
{{- if and $memory (gt (include "baton.number" $shared | float64) (include "baton.number" $memory | float64)) }}
{{- fail (printf "%s.sharedMemory: %v is above the memory limit, %v, of which it is a part" .at $shared $memory) }}
{{- end }}
{{- end }}

{{- /* Needs a dict: at, env. */ -}}
{{- define "baton.checkEnv" -}}
{{- $this := . }}
{{- range $key, $_ := .env | default dict }}
{{- if or (hasPrefix "BATON_" $key) (has $key (list "POD_NAME" "POD_IP" "NODE_NAME" "HOME" "XDG_CACHE_HOME" "HF_HOME" "VLLM_CACHE_ROOT" "HF_TOKEN" "UCX_TLS")) }}
{{- fail (printf "%s.env.%s: the chart sets it; Baton's own settings belong into config" $this.at $key) }}
{{- end }}
{{- end }}
{{- end }}

{{- /* Needs a dict: at, resources. */ -}}
{{- define "baton.checkResources" -}}
{{- $this := . }}
{{- $limits := dig "limits" dict (.resources | default dict) }}
{{- range $key, $asked := dig "requests" dict (.resources | default dict) }}
{{- $limit := get $limits $key }}
{{- if and (or (contains "/" $key) (hasPrefix "hugepages-" $key)) (ne (toString $asked) (toString $limit)) }}
{{- fail (printf "%s.resources.requests.%s: of these a pod gets its limit, so say it in limits; here leave it out" $this.at $key) }}
{{- end }}
{{- if and (hasKey $limits $key) (gt (include "baton.number" $asked | float64) (include "baton.number" $limit | float64)) }}
{{- fail (printf "%s.resources.requests.%s: %v is above its limit, %v" $this.at $key $asked $limit) }}
{{- end }}
{{- end }}
{{- end }}

{{- /* A quantity of Kubernetes as a number. */ -}}
{{- define "baton.number" -}}
{{- $units := dict "m" 0.001 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "Ki" 1024.0 "Mi" 1048576.0 "Gi" 1073741824.0 "Ti" 1099511627776.0 }}
{{- $unit := kindIs "string" . | ternary (regexFind "[A-Za-z]*$" (toString .)) "" }}
{{- mulf (toString . | trimSuffix $unit | float64) (get $units $unit | default 1.0) }}
{{- end }}

{{- /* GPUs, and what moves KV between them. */ -}}
{{- define "baton.checkDevices" -}}
{{- $this := . }}
{{- $pool := .pool }}
{{- $efa := eq (include "baton.hasEfa" .root) "true" }}
{{- $engine := dig "engine" dict .config }}
{{- $devices := dig "rdma" "resources" dict $pool | keys | sortAlpha | join ", " }}
{{- range $other, $one := .root.Values.pools }}
{{- $theirs := dig "rdma" "resources" dict $one | keys | sortAlpha | join ", " }}
{{- if and $theirs (ne $theirs $devices) }}
{{- fail (printf "%s.rdma: pools.%s moves KV over %s, so this one must have the same in rdma.resources" $this.at $other $theirs) }}
{{- end }}
{{- end }}
{{- if and $efa (contains "\"backends\":" (dig "args" "kv_transfer_config" dict $engine | toJson)) }}
{{- fail "config.engine.args.kv_transfer_config: the chart sets the backends, LIBFABRIC, where pools have EFA; leave them out" }}
{{- end }}
{{- $gpus := include "baton.gpus" $pool | int }}
{{- if $pool.rdma }}
{{- if not $gpus }}{{ fail (printf "%s.rdma: it moves KV between GPUs, and resources.limits has no nvidia.com/gpu" .at) }}{{ end }}
{{- if hasKey $engine "transport_required" }}
{{- fail (printf "%s.rdma: the chart sets engine.transport_required by it; leave that out of config" .at) }}
{{- end }}
{{- end }}
{{- if $gpus }}
{{- $size := $pool.groupSize | default 1 | int }}
{{- $needed := mul (dig "tensor_parallel_size" 1 $engine | int) (dig "data_parallel_size" 1 $engine | int) (dig "args" "pipeline_parallel_size" 1 $engine | int) }}
{{- if eq $pool.role "colocated" }}{{ $needed = mul 2 $needed }}{{ end }}
{{- if ne (mul $gpus $size | int) (int $needed) }}
{{- fail (printf "%s.resources: %d GPUs in %d pods, but its engines take %d (tensor_parallel_size x data_parallel_size x pipeline_parallel_size%s)" .at $gpus $size $needed (eq $pool.role "colocated" | ternary ", twice" "")) }}
{{- end }}
{{- end }}
{{- end }}

{{- /* How many, and what decides it. */ -}}
{{- define "baton.checkReplicas" -}}
{{- $this := . }}
{{- $values := .root.Values }}
{{- $pool := .pool }}
{{- if and $pool.autoscale (hasKey $pool "replicas") }}
{{- fail (printf "%s.replicas: autoscale decides it; leave one of the two out" .at) }}
{{- end }}
{{- if $pool.autoscale }}
{{- range $other, $one := $values.pools }}
{{- if and (ne $other $this.name) (or (eq $one.role $pool.role) (eq $one.role "colocated") (eq $pool.role "colocated")) }}
{{- fail (printf "%s.autoscale: replicas are counted by role, and pools.%s is of the same role; scale a role that has one pool" $this.at $other) }}
{{- end }}
{{- end }}
{{- if dig "scheduler" "scaling" "apply" false $values.config }}
{{- fail (printf "config.scheduler.scaling.apply: a worker that changes its role stays in its pool, and %s.autoscale counts by role; leave one of the two out" .at) }}
{{- end }}
{{- if and (eq $values.scaling.actuator "operator") (eq $pool.role "colocated") }}
{{- fail (printf "%s.autoscale: the operator gives a pool the size of one role, and a colocated pool has two; use scaling.actuator keda" .at) }}
{{- end }}
{{- if gt (int $pool.autoscale.min) (int $pool.autoscale.max) }}{{ fail (printf "%s.autoscale: min is above max" .at) }}{{ end }}
{{- if and (eq $values.scaling.actuator "keda") (not $values.monitoring.podMonitor) (not $values.scaling.prometheus) }}
{{- fail (printf "%s.autoscale: KEDA asks Prometheus, which reads the scheduler by monitoring.podMonitor; set that, or name in scaling.prometheus one that reads it by other means" .at) }}
{{- end }}
{{- end }}
{{- if and $values.scaling.idleSeconds (not $pool.autoscale) }}
{{- fail (printf "%s.autoscale: scaling.idleSeconds takes all pools to zero together, so each needs it" .at) }}
{{- end }}
{{- end }}
