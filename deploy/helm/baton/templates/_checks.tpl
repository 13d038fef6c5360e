{{- /* What fits together is decided here, before anything is applied: each wrong value gets one sentence. */ -}}
{{- define "baton.checks" -}}
{{- $values := .Values }}
{{- $known := .Files.Get "settings.json" | fromJsonArray }}
{{- include "baton.checkSettings" (dict "known" $known "at" "" "name" "config." "tree" $values.config) }}
{{- range $name, $pool := $values.pools }}
{{- include "baton.checkSettings" (dict "known" $known "at" "" "name" (printf "pools.%s.config." $name) "tree" ($pool.config | default dict)) }}
{{- end }}
{{- if or (gt (len .Release.Name) 40) (not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" .Release.Name)) }}
{{- fail (printf "the release name %q: at most 40 small letters, digits and dashes, a letter first; objects are named after it" .Release.Name) }}
{{- end }}
{{- range $name, $pool := $values.pools }}
{{- if and $pool.instanceType (hasKey ($pool.nodeSelector | default dict) "node.kubernetes.io/instance-type") }}
{{- fail (printf "pools.%s.nodeSelector: instanceType sets node.kubernetes.io/instance-type; leave one of the two out" $name) }}
{{- end }}
{{- range $key, $_ := $pool.env | default dict }}
{{- if or (hasPrefix "BATON_" $key) (has $key (list "POD_NAME" "POD_IP" "NODE_NAME" "HOME" "XDG_CACHE_HOME" "HF_HOME" "VLLM_CACHE_ROOT" "HF_TOKEN" "UCX_TLS")) }}
{{- fail (printf "pools.%s.env.%s: the chart sets it; Baton's own settings belong into config" $name $key) }}
{{- end }}
{{- end }}
{{- end }}
{{- $roles := list }}
{{- range $values.pools }}{{ $roles = append $roles .role }}{{ end }}
{{- if not (or (has "decode" $roles) (has "colocated" $roles)) }}
{{- fail "pools: one with role decode or colocated is needed; deploy/helm/examples has whole files of values" }}
{{- end }}
{{- range $section, $keys := dict
  "scheduler" (list "host" "port" "advertise_host" "advertise_port" "metrics_port" "scheduler_id" "leader_store" "leader_lock_file")
  "worker" (list "host" "port" "advertise_host" "advertise_port" "metrics_port" "worker_id" "topology" "scheduler_address")
  "front_proxy" (list "host" "port" "grpc_port" "metrics_port" "front_proxy_id" "scheduler_address")
  "tls" (list "cert_file" "key_file" "ca_file" "name") }}
{{- range $key := $keys }}
{{- if hasKey (dig $section dict $values.config) $key }}{{ fail (printf "config.%s.%s: the chart sets it; leave it out" $section $key) }}{{ end }}
{{- range $name, $pool := $values.pools }}
{{- if hasKey (dig "config" $section dict $pool) $key }}{{ fail (printf "pools.%s.config.%s.%s: the chart sets it; leave it out" $name $section $key) }}{{ end }}
{{- end }}
{{- end }}
{{- end }}
{{- if and $values.model.claim (dig "engine" "model" "" $values.config) }}
{{- fail "config.engine.model: the chart sets it where model.claim is set; leave one of the two out" }}
{{- end }}
{{- if or (ne (dig "auth" "mode" "off" $values.config) "off") (ne (dig "accounts" "mode" "off" $values.config) "off") }}
{{- fail "config.auth and config.accounts: the chart has no volume for secrets and ledger yet; put a gateway with keys before the front proxies" }}
{{- end }}
{{- range $key, $value := dig "scheduler" "scaling" dict $values.config }}
{{- if has $key (list "actuator" "idle_s" "prefill_min" "decode_min") }}
{{- fail (printf "config.scheduler.scaling.%s: the chart sets it, by autoscale of the pools and scaling.idleSeconds" $key) }}
{{- end }}
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
{{- if and $values.gateway.inferencePool.enabled (not $values.gateway.inferencePool.picker) }}
{{- fail "gateway.inferencePool.picker: the Service of an endpoint picker is needed; without one leave inferencePool off" }}
{{- end }}
{{- $scaled := false }}
{{- range $values.pools }}{{ if .autoscale }}{{ $scaled = true }}{{ end }}{{ end }}
{{- if and (eq $values.scaling.actuator "operator") (not $scaled) }}
{{- fail "scaling.actuator: the operator has nothing to scale; give a pool autoscale" }}
{{- end }}
{{- range $name, $pool := $values.pools }}{{ include "baton.checkPool" (dict "root" $ "name" $name "pool" $pool) }}{{ end }}
{{- end }}

{{- /* Every key is a setting of Baton, or leads to one. Needs a dict: known, at (the path of the tree, with its dot), name, tree. */ -}}
{{- define "baton.checkSettings" -}}
{{- $this := . }}
{{- range $key, $value := .tree }}
{{- $path := printf "%s%s" $this.at $key }}
{{- if not (has $path $this.known) }}
{{- $leads := false }}
{{- range $this.known }}{{ if hasPrefix (printf "%s." $path) . }}{{ $leads = true }}{{ end }}{{ end }}
{{- if not $leads }}{{ fail (printf "%s%s: no process of Baton has such a setting; `baton config --all` shows every one" $this.name $path) }}{{ end }}
{{- if not (kindIs "map" $value) }}{{ fail (printf "%s%s: this is a table of settings" $this.name $path) }}{{ end }}
{{- include "baton.checkSettings" (dict "known" $this.known "at" (printf "%s." $path) "name" $this.name "tree" $value) }}
{{- end }}
{{- end }}
{{- end }}

{{- define "baton.checkPool" -}}
{{- $values := .root.Values }}
{{- $pool := .pool }}
{{- $at := printf "pools.%s" .name }}
{{- $size := $pool.groupSize | default 1 | int }}
{{- if and (gt $size 1) (ne ($pool.workload | default "Deployment") "LeaderWorkerSet") }}
{{- fail (printf "%s.groupSize: %d pods for one engine need workload LeaderWorkerSet" $at $size) }}
{{- end }}
{{- if and (gt $size 1) (not $pool.instanceType) }}
{{- fail (printf "%s.instanceType: a group of %d pods waits for its slowest node, so name one type for all" $at $size) }}
{{- end }}
{{- if and (gt $size 1) (eq $pool.role "colocated") }}{{ fail (printf "%s.groupSize: a colocated pod is on one node" $at) }}{{ end }}
{{- if and (hasKey $pool "replicas") $pool.autoscale }}
{{- fail (printf "%s.replicas: autoscale decides it; leave one of the two out" $at) }}
{{- end }}
{{- if $pool.autoscale }}
{{- range $other, $one := $values.pools }}
{{- if and (ne $other $.name) (or (eq $one.role $pool.role) (eq $one.role "colocated") (eq $pool.role "colocated")) }}
{{- fail (printf "%s.autoscale: replicas are counted by role, and pools.%s is of the same role; scale a role that has one pool" $at $other) }}
{{- end }}
{{- end }}
{{- if gt (int $pool.autoscale.min) (int $pool.autoscale.max) }}{{ fail (printf "%s.autoscale: min is above max" $at) }}{{ end }}
{{- end }}
{{- if and $values.scaling.idleSeconds (not $pool.autoscale) }}
{{- fail (printf "%s.autoscale: scaling.idleSeconds takes all pools to zero together, so each needs it" $at) }}
{{- end }}
{{- range $section, $own := $pool.config }}
{{- if not (has $section (list "engine" "worker" "prefill_worker" "decode_worker")) }}
{{- fail (printf "%s.config.%s: a pool's own settings are of engine, worker, prefill_worker and decode_worker" $at $section) }}
{{- end }}
{{- range $key, $value := $own }}
{{- $common := dig $section $key "" $values.config }}
{{- if and (eq $section "engine") (has $key (list "block_size_tokens" "model" "dtype" "tensor_parallel_size" "kind")) (ne (toString $value) (toString $common)) }}
{{- fail (printf "%s.config.engine.%s: pools exchange KV, so it is the same for all; set config.engine.%s" $at $key $key) }}
{{- end }}
{{- end }}
{{- end }}
{{- if and (eq (include "baton.hasEfa" .root) "true") (not (dig "rdma" "resources" "vpc.amazonaws.com/efa" 0 $pool)) }}
{{- fail (printf "%s.rdma: another pool moves KV over EFA, so this one must have vpc.amazonaws.com/efa too" $at) }}
{{- end }}
{{- $gpus := include "baton.gpus" $pool | int }}
{{- if $gpus }}
{{- $config := mergeOverwrite (deepCopy $values.config) (deepCopy (dig "config" dict $pool)) }}
{{- $engine := dig "engine" dict $config }}
{{- $needed := mul (dig "tensor_parallel_size" 1 $engine | int) (dig "data_parallel_size" 1 $engine | int) (dig "args" "pipeline_parallel_size" 1 $engine | int) }}
{{- if eq $pool.role "colocated" }}{{ $needed = mul 2 $needed }}{{ end }}
{{- if ne (mul $gpus $size | int) (int $needed) }}
{{- fail (printf "%s.resources: %d GPUs in %d pods, but its engines take %d (tensor_parallel_size x data_parallel_size x pipeline_parallel_size%s)" $at $gpus $size $needed (eq $pool.role "colocated" | ternary ", twice" "")) }}
{{- end }}
{{- end }}
{{- end }}
