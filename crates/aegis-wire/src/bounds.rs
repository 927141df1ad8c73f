//! Every size, depth, count, rate and deadline at a border, in one place.

use std::time::Duration;

/// Generation of the channel protocol that this build speaks; both sides use the lower one.
pub const CHANNEL_GENERATION: u32 = 1;
/// Generation of the protocol between aegisd and aegis-worker.
pub const WORKER_GENERATION: u32 = 1;

/// Largest payload of one epoch frame, bytes.
pub const FRAME_PAYLOAD_MAX: usize = 32 * 1024;
/// Largest JSON-RPC message or stream head, bytes (contracts/aegis.md 5).
pub const RPC_MESSAGE_MAX: usize = 1024 * 1024;
/// JSON values of one message from a machine: more than any of them needs, and no more than a few
/// megabytes in memory.
pub const RPC_VALUES_MAX: usize = 16 * 1024;
/// Largest JSON line on a worker's socket, bytes: a launch with env and command fits, and a command
/// with its input.
pub const WORKER_LINE_MAX: usize = 3 * 1024 * 1024;
/// JSON-RPC requests in flight per direction and machine (contracts/aegis.md 5).
pub const RPC_IN_FLIGHT_MAX: usize = 64;
/// Streams that the host opens on one machine's channel at a time: execs, port connections.
pub const STREAMS_MAX: usize = 128;
/// Streams that yamux counts at most; above [`STREAMS_MAX`] because closing ones count too.
pub const STREAMS_COUNTED_MAX: usize = 2 * STREAMS_MAX;
/// Receive window of all streams of one channel together, bytes.
pub const CHANNEL_WINDOW: usize = STREAMS_COUNTED_MAX * 256 * 1024;
/// Size of the pieces in which yamux sends, bytes: keeps RPC quick beside bulk.
pub const CHANNEL_SPLIT: usize = 16 * 1024;
/// Largest chunk of output in one exec or log frame, bytes.
pub const OUTPUT_CHUNK_MAX: usize = 64 * 1024;
/// Pages of one read or write of a workspace.
pub const WORKSPACE_PAGES_MAX: u16 = 128;
/// The same in bytes.
pub const WORKSPACE_TRANSFER_MAX: usize = WORKSPACE_PAGES_MAX as usize * 4096;
/// Largest message about a workspace, bytes: a transfer and its head, or two names.
pub const WORKSPACE_MESSAGE_MAX: usize = WORKSPACE_TRANSFER_MAX + 8 * 1024;
/// Messages of one side that wait for the other's word that they came…
pub const WORKSPACE_UNHEARD_MAX: usize = 64;
/// … and their bytes.
pub const WORKSPACE_UNHEARD_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Requests that a machine makes of its workspace's server at a time.
pub const WORKSPACE_IN_FLIGHT_MAX: usize = 16;
/// What a machine reads ahead of a program that reads a file of its workspace, bytes.
pub const WORKSPACE_READ_AHEAD: u32 = 1024 * 1024;
/// Longest path of a workspace, bytes.
pub const WORKSPACE_PATH_MAX: usize = 1024;
/// Rows, and columns, of a terminal: more than any screen has, and little for a program to allocate.
pub const TERMINAL_SIDE_MAX: u16 = 4096;
/// Longest name of a kind of terminal, bytes.
pub const TERM_MAX: usize = 64;
/// Typed bytes that wait in a machine for a program that does not read them.
pub const TERMINAL_INPUT_MAX: usize = 256 * 1024;
/// A program that takes nothing for so long, with all that may wait waiting, loses it: the end of the
/// session comes behind it.
pub const TERMINAL_STALL: Duration = Duration::from_secs(60);
/// Commands that a host's clients are attached to at a time.
pub const ATTACHED_MAX: usize = 256;
/// An attached client says within this what to run, and reads within this how it ended.
pub const ATTACHED_DEADLINE: Duration = Duration::from_secs(10);
/// It is asked so often whether it is still there: where a command takes no input, its client is not
/// read from.
pub const ATTACHED_PING: Duration = Duration::from_secs(5);
/// Bytes of standard input that are under way to a command, beyond what it has taken.
pub const STDIN_WINDOW: usize = 256 * 1024;
/// Standard input of a command that is said with it, bytes.
pub const STDIN_GIVEN_MAX: usize = 1024 * 1024;
/// Largest body of an exec, bytes: that, in base64, and all else.
pub const EXEC_BODY_MAX: usize = STDIN_GIVEN_MAX.div_ceil(3) * 4 + HOST_BODY_MAX;
/// What an attached command's output makes of log entries, bytes; the rest is its client's alone, and
/// washes nothing out of the log.
pub const ATTACHED_LOG_MAX: usize = 1024 * 1024;
/// A machine whose own command waits for a client ends after this without one.
pub const ATTACH_DEADLINE: Duration = Duration::from_secs(60);
/// A client that stays with its command takes the last of its output within this: somebody may read it
/// page by page.
pub const ATTACH_LEAVE: Duration = Duration::from_secs(3600);
/// Longest path in a machine, bytes: what Linux takes, without its zero byte.
pub const FILE_PATH_MAX: usize = 4096;
/// Longest name of a directory's entry, bytes.
pub const FILE_NAME_MAX: usize = 255;
/// Entries of one directory that are listed.
pub const FILE_ENTRIES_MAX: usize = 100_000;
/// Directories that one watch watches.
pub const FILE_WATCHES_MAX: usize = 4096;
/// Levels of directories that are walked inside: more than a path has.
pub const FILE_DEPTH_MAX: usize = FILE_PATH_MAX / 2;
/// A machine answers to a question about its files within this; to remove a large tree takes long.
pub const FILE_DEADLINE: Duration = Duration::from_secs(50);
/// A side that sends or takes nothing of a file for so long ends it.
pub const FILE_STALL: Duration = Duration::from_secs(300);
/// Longest log line before it is cut in parts, bytes.
pub const LOG_LINE_MAX: usize = 16 * 1024;
/// One machine's log file is rotated at this size, bytes; one older file is kept.
pub const LOG_FILE_MAX: u64 = 8 * 1024 * 1024;
/// Log bytes per second that a worker takes from one machine before it lets it wait.
pub const LOG_RATE: u32 = 8 * 1024 * 1024;

/// One image is fetched and unpacked within this.
pub const IMAGE_DEADLINE: Duration = Duration::from_secs(2 * 3600);
/// Names of images that a host knows.
pub const IMAGE_NAMES_MAX: usize = 4096;

/// Body of a couch request, bytes (contracts/couch.md 9).
pub const COUCH_BODY_MAX: usize = 64 * 1024;
/// Body of a host API request, bytes.
pub const HOST_BODY_MAX: usize = 256 * 1024;
/// Body of a guest API request, bytes (contracts/aegis.md 4).
pub const GUEST_BODY_MAX: usize = 256 * 1024;
/// Request line and headers of a guest API request, bytes.
pub const GUEST_HEAD_MAX: usize = 16 * 1024;
/// Connections to the guest API of one machine; more wait in the backlog.
pub const GUEST_CONNECTIONS_MAX: usize = 128;
/// Bytes of all request bodies that a harness holds at a time; parsed, they take far more.
pub const GUEST_BODIES_MAX: usize = 4 * GUEST_BODY_MAX;
/// Params of one guest call as JSON, bytes: a body, written anew, may grow.
pub const GUEST_PARAMS_MAX: usize = 2 * GUEST_BODY_MAX;
/// Params of all calls of one machine that its worker holds at a time, bytes.
pub const GUEST_PARAMS_HELD_MAX: usize = 4 * GUEST_PARAMS_MAX;
/// Longest ticket of a streamed answer, bytes.
pub const TICKET_MAX: usize = 128;
/// Streams of answers that wait in a machine for the answer that names them.
pub const TICKETS_MAX: usize = 32;
/// Followers of `/couch/events` at a time.
pub const EVENT_FOLLOWERS_MAX: usize = 64;
/// Events that are read for one follower at once; no more of them wait in memory for it.
pub const EVENT_PAGE: usize = 200;
/// Longest prefix of a kind that events can be asked for by, bytes.
pub const EVENT_KIND_MAX: usize = 64;
/// A follower hears at least a comment this often.
pub const EVENT_KEEP_ALIVE: Duration = Duration::from_secs(15);
/// A follower that lost the daemon comes back after this.
pub const EVENT_RETRY: Duration = Duration::from_secs(1);
/// Guests that metrics show one by one; the rest is counted.
pub const METRICS_GUESTS_MAX: usize = 500;
/// Rows of a list without `limit`, and the most that `limit` can ask for (contracts/couch.md 9).
pub const PAGE_MAX: usize = 1000;
/// Bytes of a secret.
pub const SECRET_VALUE_MAX: usize = 32 * 1024;
/// Secrets that a host keeps.
pub const SECRETS_KEPT_MAX: usize = 256;
/// Hosts at which one secret's placeholder stands for it.
pub const SECRET_HOSTS_MAX: usize = 16;
/// Bytes of all secrets that one machine gets, as JSON: with the rest of a launch they fit in a message.
pub const SECRETS_INJECTED_MAX: usize = 256 * 1024;
/// Hosts that one machine's own authority signs for: its certificate fits in a launch.
pub const CA_HOSTS_MAX: usize = 256;
/// Exposed ports of an instance.
pub const EXPOSES_MAX: usize = 64;
/// Words of a command.
pub const COMMAND_WORDS_MAX: usize = 1024;
/// Bytes of a command and its environment together.
pub const COMMAND_BYTES_MAX: usize = 128 * 1024;

/// Largest first line of a connection to the hatch, bytes.
pub const KNOCK_MAX: usize = 1024;
/// Connections to the hatch that one machine has at a time; more wait in the backlog.
pub const DOOR_CONNECTIONS_MAX: usize = 64;
/// Request line and headers of a request to the hatch, bytes.
pub const DOOR_HEAD_MAX: usize = 64 * 1024;
/// Body of a call to the LLM door, bytes.
pub const LLM_BODY_MAX: usize = 16 * 1024 * 1024;
/// JSON values in it.
pub const LLM_VALUES_MAX: usize = 256 * 1024;
/// Bytes of the bodies of one machine's calls at a time, until they are with the vendor.
pub const LLM_HELD_MAX: usize = 32 * 1024 * 1024;
/// The same of all machines, small ones apart.
pub const LLM_HELD_BY_ALL_MAX: usize = 512 * 1024 * 1024;
/// What bodies take while they are looked at, of all machines together.
pub const LLM_PARSED_MAX: usize = 256 * 1024 * 1024;
/// A vendor's answer that comes in one piece, and one event of a stream, bytes.
pub const LLM_ANSWER_MAX: usize = 16 * 1024 * 1024;
/// What is passed on of a vendor's error, bytes.
pub const LLM_ERROR_MAX: usize = 64 * 1024;

/// The first line of a connection to the hatch.
pub const KNOCK_DEADLINE: Duration = Duration::from_secs(5);
/// Head of a request to the hatch, also on an idle connection.
pub const DOOR_HEAD_DEADLINE: Duration = Duration::from_secs(60);
/// A connection from the hatch to a service, a vendor or an address comes about within this.
pub const DOOR_CONNECT_DEADLINE: Duration = Duration::from_secs(10);
/// Body of a call to the LLM door.
pub const LLM_BODY_DEADLINE: Duration = Duration::from_secs(20);
/// A whole call, from its reservation to its end.
pub const LLM_DEADLINE: Duration = Duration::from_secs(600);
/// From connect to the first answer of a harness in a clone.
pub const IDENTIFY_DEADLINE: Duration = Duration::from_secs(20);
/// Cold boot of a golden machine, up to its quiesced state.
pub const GOLDEN_DEADLINE: Duration = Duration::from_secs(240);
/// A commit, from the ask to all of it on the host's disk: it reads all that the machine has written.
pub const COMMIT_DEADLINE: Duration = Duration::from_secs(300);
/// One ordinary JSON-RPC call on the channel.
pub const RPC_DEADLINE: Duration = Duration::from_secs(15);
/// Head of a guest API request, also on an idle connection; and its body.
pub const GUEST_READ_DEADLINE: Duration = Duration::from_secs(15);
/// A process that takes nothing of its answer for so long gets no more of it.
pub const GUEST_WRITE_DEADLINE: Duration = Duration::from_secs(300);
/// A machine's call waits so long for an aegisd that serves it, and inside for a session.
pub const BROKER_WAIT: Duration = Duration::from_secs(5);
/// aegisd answers a machine's call within this.
pub const GUEST_CALL_DEADLINE: Duration = Duration::from_secs(60);
/// A stream and the answer that names it find each other within this.
pub const TICKET_DEADLINE: Duration = Duration::from_secs(10);
/// What a primary process gets between SIGTERM and SIGKILL.
pub const GUEST_STOP_GRACE: Duration = Duration::from_secs(5);
/// How long the host waits for a graceful stop before it destroys the machine.
pub const HOST_STOP_DEADLINE: Duration = Duration::from_secs(8);
/// A kill gives the freeze this long, then destroys all the same.
pub const KILL_FREEZE_DEADLINE: Duration = Duration::from_millis(50);
/// A kill's answer waits this long for the proof (contracts/couch.md 7).
pub const KILL_VERIFY_DEADLINE: Duration = Duration::from_secs(10);
/// A worker that was started and hears no launch ends itself.
pub const WORKER_LAUNCH_DEADLINE: Duration = Duration::from_secs(10);
/// What a spare machine may take to rehearse.
pub const WARM_DEADLINE: Duration = Duration::from_secs(10);
/// How often a worker reports usage while its machine runs.
pub const USAGE_EVERY: Duration = Duration::from_secs(1);

const _: () = assert!(
    HOST_STOP_DEADLINE.as_millis() > GUEST_STOP_GRACE.as_millis() + 1000,
    "the host must wait longer than the guest works"
);
const _: () = assert!(HOST_BODY_MAX >= OUTPUT_CHUNK_MAX, "one bound holds for all messages");
const _: () = assert!(CHANNEL_SPLIT <= FRAME_PAYLOAD_MAX);
const _: () = assert!(OUTPUT_CHUNK_MAX < RPC_MESSAGE_MAX && LOG_LINE_MAX < OUTPUT_CHUNK_MAX);
const _: () = assert!(LLM_BODY_MAX <= LLM_HELD_MAX && LLM_HELD_MAX <= LLM_HELD_BY_ALL_MAX);
const _: () = assert!(LLM_BODY_MAX + LLM_VALUES_MAX * 128 <= LLM_PARSED_MAX, "the largest fits");
const _: () = assert!(WORKSPACE_IN_FLIGHT_MAX < WORKSPACE_UNHEARD_MAX);
const _: () =
    assert!(WORKSPACE_IN_FLIGHT_MAX * WORKSPACE_TRANSFER_MAX <= WORKSPACE_UNHEARD_BYTES_MAX);
const _: () = assert!(SECRETS_INJECTED_MAX + COMMAND_BYTES_MAX < RPC_MESSAGE_MAX);
const _: () = assert!(
    STDIN_GIVEN_MAX.div_ceil(3) * 4 + 6 * COMMAND_BYTES_MAX < WORKER_LINE_MAX,
    "base64, and JSON that writes a byte as six"
);
const _: () = assert!(SECRET_VALUE_MAX < HOST_BODY_MAX / 6, "JSON may write a byte as six");
const _: () = assert!(GUEST_PARAMS_MAX < RPC_MESSAGE_MAX && GUEST_PARAMS_MAX < WORKER_LINE_MAX);
