//! The real binary as a child process: its environment, its log, its end.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::channel;
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::cloud::{Cloud, KEY};

/// How long a test waits for something before it fails: longer than anything here takes on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(240);

/// How to start the binary: its folder, and its whole environment.
pub struct Sidecar {
    binary: PathBuf,
    pub dir: tempfile::TempDir,
    env: BTreeMap<String, String>,
    args: Vec<String>,
}

impl Sidecar {
    pub fn new(binary: impl Into<PathBuf>) -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        Sidecar { binary: binary.into(), dir, env: BTreeMap::new(), args: Vec::new() }
    }

    /// With the key and the URL of this cloud, and every wait as short as may be.
    pub fn of(binary: impl Into<PathBuf>, cloud: &Cloud) -> Self {
        let sidecar = Self::new(binary);
        sidecar.env("API_KEY", KEY).env("BALENA_API_URL", cloud.url()).env("REFRESH_RATE", "1s")
    }

    pub fn env(mut self, name: &str, value: impl Into<String>) -> Self {
        self.env.insert(name.into(), value.into());
        self
    }

    pub fn env_remove(mut self, name: &str) -> Self {
        self.env.remove(name);
        self
    }

    pub fn args<'a>(mut self, args: impl IntoIterator<Item = &'a str>) -> Self {
        self.args.extend(args.into_iter().map(str::to_owned));
        self
    }

    /// A path in its folder.
    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The target file, where no option names another one.
    pub fn list(&self) -> String {
        let path = self.path("balena.json");
        std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.binary);
        command.env_clear().envs(&self.env).args(&self.args).current_dir(&self.dir).stdin(Stdio::null());
        command
    }

    /// Runs it once and expects success; gives its log.
    pub fn oneshot(&self) -> String {
        let mut command = self.command();
        command.arg("--oneshot");
        let output = finish(command);
        let log = String::from_utf8(output.stderr).expect("UTF-8");
        assert!(output.status.success(), "{}\n{log}", output.status);
        log
    }

    pub fn start(&self) -> Running {
        Running::spawn(self.command())
    }

    /// The same, in this cgroup.
    pub fn start_in(&self, cgroup: &Path) -> Running {
        let mut command = Command::new("sh");
        command.args(["-c", "echo $$ > \"$1/cgroup.procs\" && shift && exec \"$@\"", "sh"]);
        command.arg(cgroup).arg(&self.binary).args(&self.args).env_clear().envs(&self.env).current_dir(&self.dir);
        Running::spawn(command)
    }

    /// `baletheus tunnel` beside it, for the same target file, through this proxy; and its URL.
    pub fn tunnel(&self, url: &str) -> (Running, String) {
        self.start_tunnel(self.command(), url)
    }

    /// The same, where it may open so many files.
    pub fn tunnel_within(&self, files: usize, url: &str) -> (Running, String) {
        let mut command = Command::new("sh");
        command.args(["-c", "ulimit -n \"$1\" && shift && exec \"$@\"", "sh", &files.to_string()]).arg(&self.binary);
        command.env_clear().envs(&self.env).current_dir(&self.dir);
        self.start_tunnel(command, url)
    }

    fn start_tunnel(&self, mut command: Command, url: &str) -> (Running, String) {
        command.arg("tunnel").env("TUNNEL_URL", url).env("TUNNEL_LISTEN_ADDRESS", "127.0.0.1:0");
        let running = Running::spawn(command);
        let line = running.wait_for("tunnel on http://");
        let url = line.split_whitespace().find(|word| word.starts_with("http://")).expect("a URL").to_owned();
        (running, url)
    }
}

/// Runs it to its end, which must come by itself.
pub fn finish(mut command: Command) -> Output {
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it runs");
    let (id, (sender, receiver)) = (child.id().to_string(), channel());
    thread::spawn(move || sender.send(child.wait_with_output()));
    let ended = receiver.recv_timeout(PATIENCE).unwrap_or_else(|_| {
        let _ = Command::new("kill").args(["-s", "KILL", &id]).status();
        panic!("it does not end: {command:?}")
    });
    ended.expect("its output")
}

/// Sends a signal to any process by its name.
pub fn send(id: u32, name: &str) -> io::Result<()> {
    let signal = match name {
        "HUP" => Signal::HUP,
        "INT" => Signal::INT,
        "TERM" => Signal::TERM,
        "KILL" => Signal::KILL,
        "STOP" => Signal::STOP,
        "CONT" => Signal::CONT,
        name => panic!("no signal {name}"),
    };
    Ok(kill_process(pid(id), signal)?)
}

pub fn pid(id: u32) -> Pid {
    Pid::from_raw(id.try_into().expect("the id of a process")).expect("the id of a process")
}

/// The binary while it runs; killed when dropped.
pub struct Running {
    child: Child,
    log: Arc<(Mutex<Vec<String>>, Condvar)>,
    reader: Option<thread::JoinHandle<()>>,
}

impl Running {
    /// All that it says is its log.
    pub fn spawn(mut command: Command) -> Self {
        let (said, says) = io::pipe().expect("a pipe");
        command.stdout(says.try_clone().expect("a pipe")).stderr(says);
        let child = command.spawn().expect("it runs");
        drop(command); // with its ends of the pipe
        let log = Arc::new((Mutex::new(Vec::new()), Condvar::new()));
        let reader = thread::spawn({
            let log = log.clone();
            move || {
                for line in BufReader::new(said).lines().map_while(Result::ok) {
                    log.0.lock().unwrap().push(line);
                    log.1.notify_all();
                }
            }
        });
        Running { child, log, reader: Some(reader) }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn log(&self) -> Vec<String> {
        self.log.0.lock().unwrap().clone()
    }

    /// Waits until `count` lines hold this text, and gives the last of them.
    pub fn wait_for_lines(&self, text: &str, count: usize) -> String {
        let deadline = Instant::now() + PATIENCE;
        let (mut read, mut found) = (0, 0);
        let mut lines = self.log.0.lock().unwrap();
        loop {
            while let Some(line) = lines.get(read) {
                (read, found) = (read + 1, found + usize::from(line.contains(text)));
                if found == count {
                    return line.clone();
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "no {count} lines with {text:?} in the log:\n{}", lines.join("\n"));
            lines = self.log.1.wait_timeout(lines, left).unwrap().0;
        }
    }

    pub fn wait_for(&self, text: &str) -> String {
        self.wait_for_lines(text, 1)
    }

    /// Sends a signal by its name, as `kill` does.
    pub fn signal(&self, name: &str) {
        let sent = send(self.id(), name);
        assert!(sent.is_ok(), "kill -s {name}: {sent:?}\n{}", self.log().join("\n"));
    }

    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("it is our child").is_some()
    }

    /// Waits for its end, and gives its status and its whole log.
    pub fn wait(mut self) -> (ExitStatus, Vec<String>) {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait().expect("it is our child") {
                self.reader.take().map(thread::JoinHandle::join);
                return (status, self.log());
            }
            thread::sleep(Duration::from_millis(5));
        }
        panic!("it does not end:\n{}", self.log().join("\n"));
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
