{{- define "dayfly.name" -}}
{{ default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- define "dayfly.fullname" -}}
{{- $name := include "dayfly.name" . -}}
{{- if .Values.fullnameOverride -}}
{{ .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else if contains $name .Release.Name -}}
{{ .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else -}}
{{ printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" }}
{{- end -}}
{{- end }}

{{- /* Labels of a component: list of the root and its name. */ -}}
{{- define "dayfly.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ include "dayfly.name" $root }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{- define "dayfly.labels" -}}
{{- $root := index . 0 -}}
{{ include "dayfly.selector" . }}
app.kubernetes.io/part-of: dayfly
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version }}
{{- end }}

{{- define "dayfly.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "dayfly.sandboxes" -}}
{{ .Values.sandboxes.namespace.name | default (printf "%s-sandboxes" .Release.Namespace) }}
{{- end }}

{{- define "dayfly.sandboxAccount" -}}
{{ include "dayfly.fullname" . }}-sandbox
{{- end }}

{{- define "dayfly.databaseSecret" -}}
{{ .Values.database.existingSecret | default (printf "%s-postgresql" (include "dayfly.fullname" .)) }}
{{- end }}

{{- define "dayfly.adminSecret" -}}
{{ .Values.admin.existingSecret | default (printf "%s-admin" (include "dayfly.fullname" .)) }}
{{- end }}

{{- define "dayfly.gatewayTls" -}}
{{ .Values.tls.gatewaySecret | default (printf "%s-gateway-tls" (include "dayfly.fullname" .)) }}
{{- end }}

{{- define "dayfly.poolTls" -}}
{{ .Values.tls.poolSecret | default (printf "%s-pool-tls" (include "dayfly.fullname" .)) }}
{{- end }}

{{- define "dayfly.hasScaler" -}}
{{- if and .Values.gateway.autoscaling.enabled (.Capabilities.APIVersions.Has "autoscaling/v2") -}}true{{- end -}}
{{- end }}

{{- define "dayfly.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ . }}
runAsGroup: {{ . }}
fsGroup: {{ . }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "dayfly.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "dayfly.probes" -}}
startupProbe:
  httpGet: {path: /live, port: admin}
  periodSeconds: 1
  failureThreshold: 60
livenessProbe:
  httpGet: {path: /live, port: admin}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  httpGet: {path: /ready, port: admin}
  periodSeconds: 2
  timeoutSeconds: 2
  failureThreshold: 2
{{- end }}

{{- define "dayfly.identity" -}}
- {name: POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
- {name: POD_NAMESPACE, valueFrom: {fieldRef: {fieldPath: metadata.namespace}}}
- {name: POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
{{- end }}

{{- /* What gateway and pool are placed by: list of the root and the component's name. */ -}}
{{- define "dayfly.placement" -}}
{{- $root := index . 0 -}}
{{- $values := index $root.Values (index . 1) -}}
{{- with $root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- with $root.Values.hostAliases }}
hostAliases: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.topologySpreadConstraints }}
topologySpreadConstraints:
  {{- range . }}
  - {{- toYaml . | nindent 4 }}
    labelSelector:
      matchLabels: {{- include "dayfly.selector" $ | nindent 8 }}
  {{- end }}
{{- end }}
{{- end }}

{{- define "dayfly.preStop" -}}
{{- if . }}
lifecycle:
  preStop:
    exec: {command: [python3, -I, -S, -c, "import time; time.sleep({{ . }})"]}
{{- end }}
{{- end }}

{{- /* Of a StatefulSet whose folder `data` outlives its pods. */ -}}
{{- define "dayfly.claims" -}}
volumeClaimTemplates:
  - metadata: {name: data}
    spec:
      accessModes: [ReadWriteOnce]
      {{- with .storageClassName }}
      storageClassName: {{ . }}
      {{- end }}
      resources: {requests: {storage: {{ .size }}}}
{{- end }}
