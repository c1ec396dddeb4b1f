//! A browser without a window, driven by its debugging protocol: a line of JSON each way, ended by a zero byte.

use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;
use tempfile::TempDir;

/// What browsers are called.
const NAMES: [&str; 6] =
    ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "chrome-headless-shell"];
/// The longest that an answer may take.
const LIMIT: Duration = Duration::from_secs(60);

/// The browser that `CHROME` names, or one on the path.
pub fn found() -> Option<PathBuf> {
    if let Some(given) = std::env::var_os("CHROME").filter(|c| !c.is_empty()) {
        return Some(given.into());
    }
    let path = std::env::var_os("PATH")?;
    NAMES.iter().find_map(|name| std::env::split_paths(&path).map(|dir| dir.join(name)).find(|file| file.is_file()))
}

/// A browser with one tab.
pub struct Chrome {
    child: Child,
    to: ChildStdin,
    from: Receiver<Value>,
    calls: u64,
    session: Option<String>,
    /// What the page has said on its console, and errors that nothing caught.
    pub said: Vec<String>,
    _profile: TempDir,
}

impl Drop for Chrome {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Chrome {
    pub fn open(browser: &Path) -> Chrome {
        let profile = tempfile::tempdir().unwrap();
        // It reads from 3 and writes to 4.
        let mut command = Command::new("bash");
        command.args(["-c", "exec \"$@\" 3<&0 4>&1 </dev/null >/dev/null 2>&1", "bash"]).arg(browser);
        command.args(["--headless", "--no-sandbox", "--remote-debugging-pipe", "--no-first-run", "--hide-scrollbars"]);
        command.args(["--disable-gpu", "--disable-dev-shm-usage", "--font-render-hinting=none", "--no-zygote"]);
        command.arg(format!("--user-data-dir={}", profile.path().display()));
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (to, from) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let (send, receive) = channel();
        std::thread::spawn(move || {
            for message in BufReader::new(from).split(0).map_while(Result::ok) {
                // The test may be over.
                let _ = send.send(serde_json::from_slice(&message).unwrap());
            }
        });
        let mut chrome = Chrome { child, to, from: receive, calls: 0, session: None, said: vec![], _profile: profile };
        let target = chrome.call("Target.createTarget", json!({"url": "about:blank"}));
        let attach = json!({"targetId": target["targetId"], "flatten": true});
        let session = chrome.call("Target.attachToTarget", attach)["sessionId"].as_str().unwrap().to_string();
        chrome.session = Some(session);
        for domain in ["Page", "Runtime", "Log"] {
            chrome.call(&format!("{domain}.enable"), json!({}));
        }
        chrome
    }

    /// The next message; notes what the page says.
    fn next(&mut self) -> Value {
        let message = self.from.recv_timeout(LIMIT).expect("the browser answers");
        match message["method"].as_str() {
            Some("Runtime.consoleAPICalled") => self.said.push(message["params"]["args"].to_string()),
            Some("Runtime.exceptionThrown") => self.said.push(message["params"]["exceptionDetails"].to_string()),
            Some("Log.entryAdded") => self.said.push(message["params"]["entry"]["text"].to_string()),
            _ => {}
        }
        message
    }

    /// Asks for something, and gives the answer.
    pub fn call(&mut self, method: &str, params: Value) -> Value {
        self.calls += 1;
        let mut message = json!({"id": self.calls, "method": method, "params": params});
        if let Some(session) = &self.session {
            message["sessionId"] = session.as_str().into();
        }
        self.to.write_all(format!("{message}\0").as_bytes()).unwrap();
        loop {
            let answer = self.next();
            if answer["id"] == self.calls {
                assert!(answer.get("error").is_none(), "{method}: {}", answer["error"]);
                return answer["result"].clone();
            }
        }
    }

    /// Shows a file in a window of that size.
    pub fn show(&mut self, file: &Path, width: u32, height: u32) {
        self.size(width, height);
        self.call("Page.navigate", json!({"url": format!("file://{}", file.display())}));
        while self.next()["method"] != "Page.loadEventFired" {}
    }

    pub fn size(&mut self, width: u32, height: u32) {
        let size = json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": false});
        self.call("Emulation.setDeviceMetricsOverride", size);
    }

    /// The value of an expression on the page.
    pub fn value(&mut self, expression: &str) -> Value {
        let result = self.call("Runtime.evaluate", json!({"expression": expression, "returnByValue": true}));
        assert!(result.get("exceptionDetails").is_none(), "{expression}: {}", result["exceptionDetails"]);
        result["result"]["value"].clone()
    }

    /// Moves the mouse.
    pub fn point(&mut self, x: f64, y: f64) {
        self.call("Input.dispatchMouseEvent", json!({"type": "mouseMoved", "x": x, "y": y}));
    }

    /// What is in the window, as PNG.
    pub fn picture(&mut self) -> Vec<u8> {
        let picture = self.call("Page.captureScreenshot", json!({"format": "png"}));
        base64(picture["data"].as_str().unwrap())
    }
}

/// Bytes of a text in base 64.
fn base64(text: &str) -> Vec<u8> {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let (mut bits, mut held, mut out) = (0u32, 0, Vec::with_capacity(text.len() / 4 * 3));
    for digit in text.bytes().filter_map(|c| DIGITS.iter().position(|d| *d == c)) {
        (bits, held) = (bits << 6 | digit as u32, held + 6);
        if held >= 8 {
            held -= 8;
            out.push((bits >> held) as u8);
        }
    }
    out
}
