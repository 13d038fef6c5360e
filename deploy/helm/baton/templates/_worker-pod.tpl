{{- /*
The pod of workers, once for every kind of workload. Needs a dict: root, name, pool, and follower where it is not the first pod
of a group: then it runs the engine's further ranks, and no worker.
*/ -}}
{{- define "baton.workerPod" -}}
{{- $root := .root }}
{{- $pool := .pool }}
{{- $values := $root.Values }}
{{- $rdma := dig "rdma" "resources" dict $pool }}
{{- $gpus := include "baton.gpus" $pool | int }}
{{- $colocated := eq $pool.role "colocated" }}
{{- $follower := .follower | default false }}
metadata:
  labels:
    {{- include "baton.podLabels" $root | nindent 4 }}
    app.kubernetes.io/component: worker
    baton/pool: {{ .name | quote }}
    baton/role: {{ $pool.role }}
  annotations:
    baton/config: {{ include "baton.config" (dict "root" $root "component" "worker" "pool" $pool) | sha256sum }}
spec:
  serviceAccountName: {{ $root.Release.Name | quote }}
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: {{ add (include "baton.drainSeconds" (dict "root" $root "pool" $pool)) 30 }}
  {{- $nodes := deepCopy ($pool.nodeSelector | default dict) }}
  {{- with $pool.instanceType }}{{ $_ := set $nodes "node.kubernetes.io/instance-type" . }}{{ end }}
  {{- $tolerations := $pool.tolerations | default list }}
  {{- if $gpus }}
  {{- $tolerations = prepend $tolerations (dict "key" "nvidia.com/gpu" "operator" "Exists" "effect" "NoSchedule") }}
  {{- end }}
  {{- include "baton.pod" (list $root (dict "nodeSelector" $nodes "tolerations" $tolerations)) | nindent 2 }}
  topologySpreadConstraints:
    - maxSkew: 1
      topologyKey: kubernetes.io/hostname
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels: {{- include "baton.poolSelector" (list $root .name) | nindent 10 }}
      {{- if eq ($pool.workload | default "Deployment") "Deployment" }}
      matchLabelKeys: [pod-template-hash]
      {{- end }}
  {{- if $values.sameZone }}
  affinity:
    podAffinity:
      requiredDuringSchedulingIgnoredDuringExecution:
        - topologyKey: topology.kubernetes.io/zone
          labelSelector:
            matchLabels: {{- include "baton.selector" (list $root "worker") | nindent 14 }}
  {{- end }}
  containers:
    - name: worker
      image: {{ $values.image.worker | quote }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      {{- if $colocated }}
      command: [/bin/bash, /etc/baton/colocated.sh]
      {{- else if gt (int $pool.groupSize) 1 }}
      command: [/bin/bash, /etc/baton/group.sh, {{ $pool.role }}]
      {{- else }}
      args: [{{ $pool.role }}, --config, /etc/baton/config.json]
      {{- end }}
      env:
        - {name: POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
        - {name: POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
        - {name: NODE_NAME, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
        - {name: BATON_WORKER__WORKER_ID, value: $(POD_NAME)}
        - {name: BATON_WORKER__ADVERTISE_HOST, value: $(POD_IP)}
        - {name: BATON_WORKER__TOPOLOGY, value: $(NODE_NAME)}
        {{- include "baton.vllmEnvironment" $root | nindent 8 }}
        {{- if $colocated }}
        - {name: BATON_GPUS_OF_EACH, value: {{ div $gpus 2 | quote }}}
        {{- end }}
        {{- include "baton.env" $pool.env | nindent 8 }}
      {{- if not .follower }}
      ports:
        - {name: grpc, containerPort: 7100}
        - {name: metrics, containerPort: 9100}
        {{- if $colocated }}
        - {name: grpc-decode, containerPort: 7101}
        - {name: metrics-decode, containerPort: 9101}
        {{- end }}
      {{- end }}
      {{- if $colocated }}
      {{- include "baton.colocatedProbes" $root | nindent 6 }}
      {{- else if not $follower }}
      {{- include "baton.probes" (list $root $values.startupBudgetSeconds) | nindent 6 }}
      {{- end }}
      resources:
        {{- $limits := merge (dict) $rdma (dig "resources" "limits" dict $pool) }}
        {{- with $limits }}
        limits: {{- toYaml . | nindent 10 }}
        {{- end }}
        {{- with dig "resources" "requests" dict $pool }}
        requests: {{- toYaml . | nindent 10 }}
        {{- end }}
      securityContext:
        {{- if dig "rdma" "privileged" false $pool }}
        privileged: true
        readOnlyRootFilesystem: true
        {{- else }}
        allowPrivilegeEscalation: false
        readOnlyRootFilesystem: true
        capabilities: {drop: [ALL]{{ if $rdma }}, add: [IPC_LOCK]{{ end }}}
        {{- end }}
      volumeMounts:
        {{- include "baton.mounts" $root | nindent 8 }}
        - {name: cache, mountPath: /cache}
        - {name: shared-memory, mountPath: /dev/shm}
        {{- if $values.model.claim }}
        - {name: model, mountPath: /models, readOnly: true}
        {{- end }}
        {{- if $values.kvVolume }}
        - {name: kv, mountPath: /kv}
        {{- end }}
  volumes:
    {{- include "baton.volumes" (list $root (printf "%s-%s" $root.Release.Name .name)) | nindent 4 }}
    - {name: cache, emptyDir: {}}
    # In memory, and so part of the memory limit. Host tiers of KV lie here.
    - {name: shared-memory, emptyDir: {medium: Memory, sizeLimit: {{ $pool.sharedMemory | default "8Gi" | quote }}}}
    {{- with $values.model.claim }}
    - {name: model, persistentVolumeClaim: {claimName: {{ . | quote }}, readOnly: true}}
    {{- end }}
    {{- with $values.kvVolume }}
    - name: kv
      {{- toYaml . | nindent 6 }}
    {{- end }}
{{- end }}

{{- /* Two processes, one container, and a kubelet that asks one question: ask both, and let the first bad answer count. */ -}}
{{- define "baton.colocatedProbes" -}}
{{- $base := printf "%s://127.0.0.1" (.Values.tls.enabled | ternary "https" "http") -}}
startupProbe:
  exec: {command: [curl, --fail, --fail-early, --silent, --insecure, --max-time, "4", "{{ $base }}:9100/readyz", "{{ $base }}:9101/readyz"]}
  periodSeconds: 5
  timeoutSeconds: 10
  failureThreshold: {{ max 1 (div .Values.startupBudgetSeconds 5) }}
readinessProbe:
  exec: {command: [curl, --fail, --fail-early, --silent, --insecure, --max-time, "4", "{{ $base }}:9100/readyz", "{{ $base }}:9101/readyz"]}
  periodSeconds: 5
  timeoutSeconds: 10
  failureThreshold: 3
livenessProbe:
  exec: {command: [curl, --fail, --fail-early, --silent, --insecure, --max-time, "4", "{{ $base }}:9100/livez", "{{ $base }}:9101/livez"]}
  periodSeconds: 10
  timeoutSeconds: 10
  failureThreshold: 6
{{- end }}
