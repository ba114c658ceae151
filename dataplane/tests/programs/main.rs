//! The programs, one packet at a time: every way out of each of them, what it does to the packet, and what it counts.

#![expect(clippy::unwrap_used, reason = "a test says what is wrong by panicking")]

mod bench;
mod drops;
mod one_host;
mod policy;
mod services;
#[path = "../support/mod.rs"]
mod support;
mod tunnel;

fn main() {
    support::main(
        &["ip"],
        |_| None,
        &[
            (
                "nothing_passes_before_the_network_is_known",
                one_host::nothing_passes_before_the_network_is_known,
            ),
            (
                "a_container_reaches_its_neighbour",
                one_host::a_container_reaches_its_neighbour,
            ),
            (
                "a_container_reaches_the_host_and_beyond",
                one_host::a_container_reaches_the_host_and_beyond,
            ),
            (
                "drops_are_counted_for_sender_and_receiver",
                drops::drops_are_counted_for_sender_and_receiver,
            ),
            (
                "drops_of_what_came_through_a_tunnel_are_the_receivers",
                drops::drops_of_what_came_through_a_tunnel_are_the_receivers,
            ),
            ("a_container_cannot_lie", one_host::a_container_cannot_lie),
            (
                "nobody_is_behind_unused_addresses",
                one_host::nobody_is_behind_unused_addresses,
            ),
            (
                "what_the_overlay_does_not_carry_is_dropped",
                one_host::what_the_overlay_does_not_carry_is_dropped,
            ),
            (
                "the_host_reaches_containers",
                one_host::the_host_reaches_containers,
            ),
            (
                "strangers_at_the_tunnel_are_dropped",
                one_host::strangers_at_the_tunnel_are_dropped,
            ),
            (
                "no_change_to_a_frame_makes_it_another_container_s",
                one_host::no_change_to_a_frame_makes_it_another_container_s,
            ),
            (
                "what_is_for_another_host_goes_into_the_tunnel",
                tunnel::what_is_for_another_host_goes_into_the_tunnel,
            ),
            (
                "what_came_through_the_tunnel_is_taken_out",
                tunnel::what_came_through_the_tunnel_is_taken_out,
            ),
            (
                "a_direct_host_needs_no_tunnel",
                tunnel::a_direct_host_needs_no_tunnel,
            ),
            (
                "the_way_to_a_host_may_be_missing",
                tunnel::the_way_to_a_host_may_be_missing,
            ),
            ("what_must_be_encrypted_is", tunnel::what_must_be_encrypted_is),
            (
                "strangers_and_liars_are_dropped",
                tunnel::strangers_and_liars_are_dropped,
            ),
            ("congestion_is_told_on", tunnel::congestion_is_told_on),
            (
                "the_host_s_own_packets_are_left_alone",
                tunnel::the_host_s_own_packets_are_left_alone,
            ),
            (
                "no_change_to_a_tunnelled_frame_makes_it_another_host_s",
                tunnel::no_change_to_a_tunnelled_frame_makes_it_another_host_s,
            ),
            (
                "the_isolated_talk_only_to_those_they_are_paired_with",
                policy::the_isolated_talk_only_to_those_they_are_paired_with,
            ),
            (
                "the_receiver_holds_policy_as_well",
                policy::the_receiver_holds_policy_as_well,
            ),
            (
                "parts_of_the_platform_are_reached_at_open_ports",
                policy::parts_of_the_platform_are_reached_at_open_ports,
            ),
            (
                "hosts_are_reached_at_open_ports",
                policy::hosts_are_reached_at_open_ports,
            ),
            (
                "transports_that_policy_does_not_know",
                policy::transports_that_policy_does_not_know,
            ),
            ("limits_hold_and_recover", policy::limits_hold_and_recover),
            (
                "packets_to_a_service_go_to_an_instance_and_back",
                services::paths::packets_to_a_service_go_to_an_instance_and_back,
            ),
            (
                "instances_may_be_anywhere",
                services::paths::instances_may_be_anywhere,
            ),
            (
                "errors_are_about_what_was_sent",
                services::paths::errors_are_about_what_was_sent,
            ),
            (
                "no_packet_leaves_for_a_virtual_address",
                services::paths::no_packet_leaves_for_a_virtual_address,
            ),
            (
                "whoever_is_behind_an_address_obeys_the_policy",
                services::paths::whoever_is_behind_an_address_obeys_the_policy,
            ),
            (
                "flows_stay_with_their_instance",
                services::flows::flows_stay_with_their_instance,
            ),
            (
                "a_port_reaches_an_instance_once",
                services::flows::a_port_reaches_an_instance_once,
            ),
            (
                "what_user_space_writes_ends_no_flow",
                services::flows::what_user_space_writes_ends_no_flow,
            ),
            (
                "no_instance_is_a_way_out",
                services::flows::no_instance_is_a_way_out,
            ),
            (
                "no_change_to_a_packet_gets_it_past_its_bounds",
                services::flows::no_change_to_a_packet_gets_it_past_its_bounds,
            ),
        ],
    )
}
