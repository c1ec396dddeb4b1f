//! The status port: what there is, for browsers, probes and monitoring. Read-only, and apart from control.
//!
//! `/healthz` answers 200 while the coordinator serves, `/metrics` in the text format of Prometheus, `/` with a page for
//! people. Everything comes from the same snapshot as the `Status` method's reply.

use crate::server::Coordinator;
use axum::Router;
use axum::extract::State;
use axum::http::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE};
use axum::response::{Html, IntoResponse};
use axum::routing::get;
use proto::control::StatusReply;
use std::fmt::{Display, Write};
use std::io;
use tokio::net::TcpListener;

/// Serves the status of a coordinator until the task is dropped. Anything but GET and HEAD is refused with 405.
///
/// # Errors
/// A server that cannot go on.
pub async fn serve(coordinator: Coordinator, socket: TcpListener) -> io::Result<()> {
    let app = Router::new()
        .route("/", get(page))
        .route("/metrics", get(metrics))
        .route("/healthz", get(async || "ok\n"))
        .with_state(coordinator);
    axum::serve(socket, app).await
}

async fn metrics(State(coordinator): State<Coordinator>) -> impl IntoResponse {
    ([(CONTENT_TYPE, "text/plain; version=0.0.4")], metrics_text(&coordinator.snapshot()))
}

async fn page(State(coordinator): State<Coordinator>) -> impl IntoResponse {
    let headers =
        [(CACHE_CONTROL, "no-store"), (CONTENT_SECURITY_POLICY, "default-src 'none'; style-src 'unsafe-inline'")];
    (headers, Html(page_text(&coordinator.snapshot())))
}

/// A label's value in the text format.
fn quoted(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

fn metrics_text(s: &StatusReply) -> String {
    let mut text = String::new();
    let mut metric = |name: &str, kind: &str, help: &str, values: &[(String, &dyn Display)]| {
        // Writing to a text does not fail.
        let _ = writeln!(text, "# HELP mesh_{name} {help}\n# TYPE mesh_{name} {kind}");
        for (labels, value) in values {
            let _ = writeln!(text, "mesh_{name}{labels} {value}");
        }
    };
    let none = String::new;
    let devices: u64 = s.workers.iter().map(|w| u64::from(w.devices)).sum();
    let silent: Vec<(String, f64)> =
        s.workers.iter().map(|w| (format!("{{worker=\"{}\"}}", w.worker), f64::from(w.silent_ms) / 1e3)).collect();
    let silent: Vec<(String, &dyn Display)> = silent.iter().map(|(l, v)| (l.clone(), v as &dyn Display)).collect();
    let mut results: Vec<_> = s.results.iter().collect();
    results.sort_by(|a, b| a.0.cmp(b.0));
    let results: Vec<(String, &dyn Display)> =
        results.into_iter().map(|(n, v)| (format!("{{name=\"{}\"}}", quoted(n)), v as &dyn Display)).collect();
    let session = u8::from(!s.session.is_empty());
    metric("build_info", "gauge", "The program's version.", &[(format!("{{version=\"{}\"}}", quoted(&s.build)), &1)]);
    metric("workers", "gauge", "Workers that have joined.", &[(none(), &s.workers.len())]);
    metric("devices", "gauge", "Devices of those workers.", &[(none(), &devices)]);
    metric("worker_silent_seconds", "gauge", "Time since a worker was heard of.", &silent);
    metric("epoch", "gauge", "The fencing token.", &[(none(), &s.epoch)]);
    metric("session", "gauge", "Whether a model program has the devices.", &[(none(), &session)]);
    metric("session_steps", "gauge", "Steps that the session has done.", &[(none(), &s.steps)]);
    metric("recoveries_total", "counter", "Sessions that took the place of another.", &[(none(), &s.recoveries)]);
    metric("checkpoints_total", "counter", "Checkpoints committed.", &[(none(), &s.checkpoints)]);
    metric("result", "gauge", "Results of one number that were fetched last, such as the loss.", &results);
    text
}

/// A text in a page.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:56rem;margin:2rem auto;padding:0 1rem;\
color:#1c2733;background:#f6f8fa}h1{font-size:1.3rem}section{background:#fff;border:1px solid #d9e0e7;\
border-radius:8px;padding:.8rem 1.2rem;margin:1rem 0}dl{display:grid;grid-template-columns:max-content 1fr;\
gap:.2rem 1.2rem;margin:0}dt{color:#5b6b7b}dd{margin:0;overflow-wrap:anywhere}table{border-collapse:collapse;\
width:100%}th{text-align:left;color:#5b6b7b;font-weight:500}td,th{padding:.2rem .8rem .2rem 0;\
border-bottom:1px solid #eef2f5}.late{color:#b3261e}@media(prefers-color-scheme:dark){body{background:#12181f;\
color:#dde5ec}section{background:#1a222b;border-color:#2b3642}td,th{border-color:#2b3642}}";

fn page_text(s: &StatusReply) -> String {
    let row = |(name, value): (&str, String)| format!("<dt>{name}</dt><dd>{}</dd>", escaped(&value));
    let or = |text: &str, none: &str| if text.is_empty() { none.into() } else { text.to_string() };
    let facts: String = [
        ("session", or(&s.session, "none: the devices are free")),
        ("steps", s.steps.to_string()),
        ("epoch", s.epoch.to_string()),
        ("recoveries", s.recoveries.to_string()),
        ("checkpoints", s.checkpoints.to_string()),
        ("newest", or(&s.checkpoint, "none yet")),
    ]
    .map(row)
    .concat();
    let mut results: Vec<_> = s.results.iter().collect();
    results.sort_by(|a, b| a.0.cmp(b.0));
    let results: String = results.into_iter().map(|(n, v)| row((&escaped(n), v.to_string()))).collect();
    let results = if results.is_empty() { results } else { format!("<section><dl>{results}</dl></section>") };
    let worker = |w: &proto::control::WorkerStatus| {
        let class = if w.silent_ms > 1000 { " class=late" } else { "" };
        let state = if w.leaving { "leaving" } else { "" };
        format!(
            "<tr><td>{}<td>{}<td>{}<td{class}>{:.1} s<td>{state}",
            w.worker,
            escaped(&w.address),
            w.devices,
            f64::from(w.silent_ms) / 1e3
        )
    };
    let workers: String = s.workers.iter().map(worker).collect();
    format!(
        "<!doctype html><html lang=en><meta charset=utf-8><meta http-equiv=refresh content=2>\
         <meta name=viewport content=\"width=device-width\"><title>mesh: {steps} steps</title><style>{STYLE}</style>\
         <h1>Mesh coordinator {build}</h1><section><dl>{facts}</dl></section>{results}<section><table><tr><th>worker\
         <th>address<th>devices<th>last heard<th>{workers}</table></section></html>\n",
        steps = s.steps,
        build = escaped(&s.build),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::control::WorkerStatus;

    fn status() -> StatusReply {
        let worker = |worker, silent_ms| WorkerStatus {
            worker,
            address: "<b>:1".into(),
            devices: 2,
            silent_ms,
            leaving: worker == 2,
        };
        StatusReply {
            build: "1.2.3".into(),
            epoch: 7,
            workers: vec![worker(1, 20), worker(2, 1500)],
            session: "mesh x=2, layout x:x".into(),
            steps: 40,
            results: [("loss".to_string(), 0.5), ("a\"b".into(), 2.0)].into(),
            ..StatusReply::default()
        }
    }

    #[test]
    fn metrics_keep_to_the_text_format() {
        let text = metrics_text(&status());
        for line in text.lines() {
            let words: Vec<&str> = line.split(' ').collect();
            match words[..] {
                ["#", "HELP", name, _, ..] => assert!(name.starts_with("mesh_"), "{line}"),
                ["#", "TYPE", name, kind] => assert!(name.starts_with("mesh_") && ["gauge", "counter"].contains(&kind)),
                [name, value] => {
                    assert!(name.starts_with("mesh_") && value.parse::<f64>().is_ok(), "{line}");
                    assert_eq!(name.contains('{'), name.ends_with("\"}"), "{line}");
                }
                _ => panic!("{line}"),
            }
        }
        for line in ["mesh_devices 4", "mesh_session_steps 40", "mesh_result{name=\"loss\"} 0.5", "mesh_epoch 7"] {
            assert!(text.lines().any(|l| l == line), "no `{line}` in\n{text}");
        }
        assert!(
            text.contains("mesh_worker_silent_seconds{worker=\"2\"} 1.5\n") && text.contains("{name=\"a\\\"b\"} 2\n")
        );
    }

    #[test]
    fn the_page_shows_texts_as_texts() {
        let page = page_text(&status());
        assert!(page.contains("&lt;b&gt;:1") && !page.contains("<b>:1"), "{page}");
        assert!(page.contains("mesh x=2, layout x:x") && page.contains("leaving"));
    }
}
