//! The receiving end of calls between members: `/raft/{id}/…` on the cluster listener.

use axum::extract::{Path, Request, State};
use axum::response::{IntoResponse as _, Response};
use axum::routing::post;
use axum::{Extension, Router};
use flynn_api::discovery::Consistency;
use flynn_api::server::{Json, Peer};
use flynn_api::{Error, ErrorCode};
use openraft::raft::{AppendEntriesRequest, AppendEntriesResponse, TransferLeaderRequest, VoteRequest};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{Snapshot, SnapshotMeta, TypeConfig, Vote, snapshot};
use crate::claims::Beat;
use crate::command::Command;
use crate::http::auth::{Action, Door};
use crate::members::{self, MemberChange};
use crate::node::{Forwarded, Node};

/// The longest call between members: a snapshot.
const MAX_CALL: usize = 1 << 30;

/// The routes.
pub fn routes() -> Router<(Node, Door)> {
    Router::new()
        .route("/raft/{id}/{call}", post(call))
        .route("/raft/members", post(change_members))
}

async fn change_members(
    State((node, door)): State<(Node, Door)>,
    Extension(peer): Extension<Peer>,
    Json(change): Json<MemberChange>,
) -> Result<Json<()>, Error> {
    door.check(&peer, &Action::Raft)?;
    members::change(&node, &change).await?;
    Ok(Json(()))
}

async fn call(
    State((node, door)): State<(Node, Door)>,
    Extension(peer): Extension<Peer>,
    Path((id, call)): Path<(u64, String)>,
    request: Request,
) -> Result<Response, Error> {
    door.check(&peer, &Action::Raft)?;
    if node.was(id) {
        // Members that are left of the old cluster follow (`recovery::follow`).
        let message = format!(
            "member {id} goes on as {}, in a cluster of its own: an operator has recovered or restored it",
            node.id()
        );
        return Err(Error::new(ErrorCode::Gone, message));
    }
    if id != node.id() {
        let message = format!(
            "this is member {}, not {id}: the address has another owner now",
            node.id()
        );
        return Err(Error::new(ErrorCode::Conflict, message));
    }
    let body = axum::body::to_bytes(request.into_body(), MAX_CALL)
        .await
        .map_err(|_| Error::validation("the call is cut short or too long"))?;
    match call.as_str() {
        "append" => {
            let rpc: AppendEntriesRequest<TypeConfig> = parse(&body)?;
            let answered = node.raft.append_entries(rpc).await;
            if matches!(&answered, Ok(taken) if !matches!(taken, AppendEntriesResponse::HigherVote(_))) {
                node.hear_leader();
            }
            answer(answered)
        }
        "vote" => {
            let rpc: VoteRequest<TypeConfig> = parse(&body)?;
            answer(node.raft.vote(rpc).await)
        }
        "pre-vote" => {
            let rpc: VoteRequest<TypeConfig> = parse(&body)?;
            answer(node.raft.pre_vote(rpc).await)
        }
        "transfer-leader" => {
            let rpc: TransferLeaderRequest<TypeConfig> = parse(&body)?;
            answer(node.raft.handle_transfer_leader(rpc).await)
        }
        "snapshot" => {
            let ((vote, meta), data) = snapshot::decode::<(Vote, SnapshotMeta)>(&body)
                .map_err(|why| Error::validation(format!("the snapshot cannot be read: {why}")))?;
            let snapshot = Snapshot {
                meta,
                snapshot: data.to_vec(),
            };
            answer(node.raft.install_full_snapshot(vote, snapshot).await)
        }
        "write" => {
            let command: Command = parse(&body)?;
            Ok(Json(node.write_here(&command).await?).into_response())
        }
        "writes" => {
            let commands: Vec<Command> = parse(&body)?;
            Ok(Json(node.write_all_here(commands).await).into_response())
        }
        "read-index" => {
            // Earlier releases say nothing, and want it linearizable.
            let wanted: Option<Consistency> = parse(&body)?;
            let index = node
                .read_index(wanted.unwrap_or(Consistency::Linearizable))
                .await?;
            Ok(Json(index).into_response())
        }
        "members" => {
            let change: MemberChange = parse(&body)?;
            Ok(Json(members::change_here(&node, &change).await?).into_response())
        }
        "member-status" => {
            let all = node.leads().map(|_| members::status_here(&node));
            Ok(Json(all.map_or(Forwarded::NotLeader, Forwarded::Taken)).into_response())
        }
        "beat" => {
            let beat: Beat = parse(&body)?;
            Ok(Json(node.beat(beat)).into_response())
        }
        "ages" => {
            let members: Vec<u64> = parse(&body)?;
            Ok(Json(node.ages(&members)).into_response())
        }
        _ => Err(Error::not_found("call", call)),
    }
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(body).map_err(|why| Error::validation(format!("the call cannot be read: {why}")))
}

fn answer<T: Serialize, E: std::fmt::Display>(result: Result<T, E>) -> Result<Response, Error> {
    match result {
        Ok(answer) => Ok(Json(answer).into_response()),
        Err(error) => Err(Error::unavailable(format!(
            "this member cannot take the call: {error}"
        ))),
    }
}
