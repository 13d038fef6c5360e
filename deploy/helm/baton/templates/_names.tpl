{{- define "baton.labels" -}}
{{ include "baton.podLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- /* Without versions: a new one of the chart alone starts no pod again. */ -}}
{{- define "baton.podLabels" -}}
app.kubernetes.io/name: baton
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{- /* What selects the pods of one component. Needs a list: root, component. */ -}}
{{- define "baton.selector" -}}
app.kubernetes.io/instance: {{ (index . 0).Release.Name | quote }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{- /* The same of one pool of workers. Needs a list: root, name. */ -}}
{{- define "baton.poolSelector" -}}
app.kubernetes.io/instance: {{ (index . 0).Release.Name | quote }}
baton/pool: {{ index . 1 | quote }}
{{- end }}

{{- define "baton.schedulerAddress" -}}
{{- $name := printf "%s-scheduler" .Release.Name }}
{{- range $i := until (int .Values.scheduler.replicas) }}{{ if $i }},{{ end }}{{ $name }}-{{ $i }}.{{ $name }}:7000{{ end }}
{{- end }}

{{- /* Of every pod: Pod Security "restricted", and where it runs. Needs a list: root, nodeSelector and tolerations in a dict. */ -}}
{{- define "baton.pod" -}}
{{- with (index . 0).Values.image.pullSecrets -}}
imagePullSecrets: {{- range . }}
  - name: {{ . | quote }}
{{- end }}
{{ end }}
{{- with (index . 1).nodeSelector -}}
nodeSelector: {{- toYaml . | nindent 2 }}
{{ end }}
{{- with (index . 1).tolerations -}}
tolerations: {{- toYaml . | nindent 2 }}
{{ end -}}
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- /* Variables of the environment, under the chart's own. */ -}}
{{- define "baton.env" -}}
{{- range $key, $value := . }}
- {name: {{ $key | quote }}, value: {{ $value | quote }}}
{{- end }}
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
- {name: config, configMap: {name: {{ index . 1 | quote }}}}
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
- {name: HF_TOKEN, valueFrom: {secretKeyRef: {name: {{ . | quote }}, key: token}}}
{{- end }}
{{- end }}
