{{- /*
The configuration of one component as JSON: the operator's, a pool's own settings over it, then what the chart decides. Only
the sections that its processes read, so that a change of another section starts none of them again.
Needs a dict: root, component, pool.
*/ -}}
{{- define "baton.config" -}}
{{- $root := .root }}
{{- $component := .component }}
{{- $address := include "baton.schedulerAddress" $root }}
{{- $config := mergeOverwrite (deepCopy $root.Values.config) (deepCopy (dig "config" dict (.pool | default dict))) }}
{{- $fixed := dict "engine" dict }}
{{- with $root.Values.model.claim }}
{{- $_ := set $fixed "engine" (dict "model" (include "baton.modelFolder" $root)) }}
{{- end }}
{{- if $root.Values.tls.enabled }}
{{- $_ := set $fixed "tls" (dict "cert_file" "/run/baton/tls/tls.crt" "key_file" "/run/baton/tls/tls.key" "ca_file" "/run/baton/tls/ca.crt") }}
{{- end }}
{{- $listen := dict "host" "0.0.0.0" "metrics_port" 9100 }}
{{- $sections := list "engine" "tls" }}
{{- $scaling := dict }}
{{- range $root.Values.pools }}
{{- if .autoscale }}
{{- $_ := set $scaling "actuator" $root.Values.scaling.actuator }}
{{- $_ := set $scaling "idle_s" $root.Values.scaling.idleSeconds }}
{{- if ne .role "decode" }}{{ $_ := set $scaling "prefill_min" .autoscale.min }}{{ end }}
{{- if ne .role "prefill" }}{{ $_ := set $scaling "decode_min" .autoscale.min }}{{ end }}
{{- end }}
{{- end }}
{{- if $scaling }}{{ $_ := set $fixed "scheduler" (dict "scaling" $scaling) }}{{ end }}
{{- if eq $component "scheduler" }}
{{- $sections = concat $sections (list "scheduler" "auth" "accounts") }}
{{- $lease := dict "lease_name" (printf "%s-scheduler" $root.Release.Name) }}
{{- $own := dict "port" 7000 "leader_store" "kubernetes" "kubernetes" $lease }}
{{- $_ := set $fixed "scheduler" (merge $own $listen ($fixed.scheduler | default dict)) }}
{{- else if eq $component "operator" }}
{{- $sections = list "tls" "scheduler" }}
{{- else if eq $component "front-proxy" }}
{{- $sections = concat $sections (list "front_proxy" "scheduler" "auth" "accounts") }}
{{- $_ := set $fixed "front_proxy" (merge (dict "port" 8000 "grpc_port" 8001 "scheduler_address" $address) $listen) }}
{{- else }}
{{- $sections = concat $sections (list "kv" "worker" "prefill_worker" "decode_worker") }}
{{- $_ := set $fixed "worker" (merge (dict "port" 7100 "scheduler_address" $address) $listen) }}
{{- end }}
{{- if dig "rdma" "resources" dict (.pool | default dict) }}
{{- $_ := set $fixed.engine "transport_required" (eq (include "baton.hasEfa" $root) "true" | ternary "" "rdma") }}
{{- end }}
{{- if eq (include "baton.hasEfa" $root) "true" }}
{{- $extra := dict "kv_connector_extra_config" (dict "backends" (list "LIBFABRIC")) }}
{{- $_ := set $fixed.engine "args" (dict "kv_transfer_config" $extra) }}
{{- end }}
{{- $all := mergeOverwrite $config $fixed }}
{{- $own := dict }}
{{- range $sections }}{{ if hasKey $all . }}{{ $_ := set $own . (get $all .) }}{{ end }}{{ end }}
{{- $own | toPrettyJson }}
{{- end }}

{{- define "baton.modelFolder" -}}
/models{{ with .Values.model.path }}/{{ . }}{{ end }}
{{- end }}

{{- /* Whether the pools move KV over EFA, for which NIXL has a backend of its own: all do, or none. */ -}}
{{- define "baton.hasEfa" -}}
{{- $found := false }}
{{- range .Values.pools }}{{ if dig "rdma" "resources" "vpc.amazonaws.com/efa" 0 . }}{{ $found = true }}{{ end }}{{ end }}
{{- $found }}
{{- end }}

{{- /* GPUs of one pod of a pool. */ -}}
{{- define "baton.gpus" -}}
{{- dig "resources" "limits" "nvidia.com/gpu" 0 . | int }}
{{- end }}

{{- /* Seconds that a worker of this pool has for its requests. */ -}}
{{- define "baton.drainSeconds" -}}
{{- $config := mergeOverwrite (deepCopy .root.Values.config) (deepCopy (dig "config" dict .pool)) }}
{{- dig "worker" "drain_timeout_s" 30 $config | float64 | ceil | int }}
{{- end }}
