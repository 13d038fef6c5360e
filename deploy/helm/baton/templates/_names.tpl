{{- define "baton.labels" -}}
app.kubernetes.io/name: baton
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- /* What selects the pods of one component. Needs a list: root, component. */ -}}
{{- define "baton.selector" -}}
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{- /* The same of one pool of workers. Needs a list: root, name. */ -}}
{{- define "baton.poolSelector" -}}
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
baton/pool: {{ index . 1 }}
{{- end }}

{{- define "baton.schedulerAddress" -}}
{{- $name := printf "%s-scheduler" .Release.Name }}
{{- range $i := until (int .Values.scheduler.replicas) }}{{ if $i }},{{ end }}{{ $name }}-{{ $i }}.{{ $name }}:7000{{ end }}
{{- end }}

{{- define "baton.pullSecrets" -}}
{{- with .Values.image.pullSecrets -}}
imagePullSecrets: {{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end }}

{{- /* Pod Security "restricted". */ -}}
{{- define "baton.podSecurity" -}}
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "baton.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- /* A process lives while its event loop answers, and is ready by its own word. Needs a list: root, startup seconds. */ -}}
{{- define "baton.probes" -}}
{{- $scheme := (index . 0).Values.tls.enabled | ternary "HTTPS" "HTTP" -}}
startupProbe:
  httpGet: {path: /readyz, port: metrics, scheme: {{ $scheme }}}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: {{ max 1 (div (index . 1) 5) }}
readinessProbe:
  httpGet: {path: /readyz, port: metrics, scheme: {{ $scheme }}}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 3
livenessProbe:
  httpGet: {path: /livez, port: metrics, scheme: {{ $scheme }}}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
{{- end }}

{{- /* Mounts and volumes that every process has: its configuration, /tmp and, with TLS, the certificate. */ -}}
{{- define "baton.mounts" -}}
- {name: config, mountPath: /etc/baton, readOnly: true}
- {name: tmp, mountPath: /tmp}
{{- if .Values.tls.enabled }}
- {name: certificate, mountPath: /run/baton/tls, readOnly: true}
{{- end }}
{{- end }}

{{- /* Needs a list: root, name of the ConfigMap. */ -}}
{{- define "baton.volumes" -}}
- {name: config, configMap: {name: {{ index . 1 }}}}
- {name: tmp, emptyDir: {}}
{{- if (index . 0).Values.tls.enabled }}
- {name: certificate, secret: {secretName: {{ (index . 0).Release.Name }}-cluster-tls, defaultMode: 0440}}
{{- end }}
{{- end }}

{{- /* Of processes that use vLLM: the root file system is read-only, so what libraries keep goes to a volume. */ -}}
{{- define "baton.vllmEnvironment" -}}
- {name: HOME, value: /cache}
- {name: XDG_CACHE_HOME, value: /cache}
- {name: HF_HOME, value: /cache/huggingface}
- {name: VLLM_CACHE_ROOT, value: /cache/vllm}
{{- with .Values.model.tokenSecret }}
- {name: HF_TOKEN, valueFrom: {secretKeyRef: {name: {{ . }}, key: token}}}
{{- end }}
{{- end }}
